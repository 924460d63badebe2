"""taskiq on JetStream, by taskiq-nats: a pull consumer, results in an object store."""

from __future__ import annotations

from nats.js.api import ConsumerConfig, RetentionPolicy, StreamConfig
from taskiq_nats import NATSObjectStoreResultBackend, PullBasedJetStreamBroker

from peers.peer import LEASE, URL
from peers.taskiq import TaskiqClient, registered

broker = PullBasedJetStreamBroker(
    [URL],
    stream_config=StreamConfig(retention=RetentionPolicy.WORK_QUEUE),
    consumer_config=ConsumerConfig(durable_name="peers", ack_wait=LEASE or 30, max_ack_pending=20_000),
    durable="peers",
).with_result_backend(NATSObjectStoreResultBackend([URL]))
work = registered(broker)


class Client(TaskiqClient):
    def __init__(self) -> None:
        super().__init__(broker)
