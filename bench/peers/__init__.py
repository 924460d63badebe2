"""mesh beside the queues a user would pick instead: `python3 dev bench --peers`.

The driver runs in the environment of the checkout. Each peer has a virtual environment of its own, in which run its
workers, as its documentation starts them, and one client process (`client.py`) that measures. What a peer's package is
called for is in one small module of its name here, behind the interface in `peer.py`.
"""
