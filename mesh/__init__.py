"""mesh: a self-hosted, Modal-shaped job queue on NATS JetStream."""

__version__ = "0.1.0"

from mesh import exception
from mesh import functions as functions  # as in Modal, `mesh.functions.FunctionCall` works without an import of its own
from mesh import queue as queue
from mesh.app import App
from mesh.call import FunctionCall
from mesh.cls import Cls, enter, exit, method, parameter
from mesh.context import (
    current_attempt,
    current_function_call_id,
    current_input_id,
    enable_output,
    interact,
    is_local,
    last_error,
)
from mesh.decorators import batched, concurrent
from mesh.exception import Error
from mesh.image import Image
from mesh.sdk import Function
from mesh.secret import Secret
from mesh.spec import Cron, Period, Retries
from mesh.unbuilt import (
    Client,
    CloudBucketMount,
    Dict,
    Environment,
    NetworkFileSystem,
    Proxy,
    Queue,
    Sandbox,
    Tunnel,
    Volume,
    Workspace,
    billing,
    forward,
    web_endpoint,
)
from mesh.web import asgi_app, fastapi_endpoint, web_server, wsgi_app

__all__ = [
    "App",
    "Client",
    "CloudBucketMount",
    "Cls",
    "Cron",
    "Dict",
    "Environment",
    "Error",
    "Function",
    "FunctionCall",
    "Image",
    "NetworkFileSystem",
    "Period",
    "Proxy",
    "Queue",
    "Retries",
    "Sandbox",
    "Secret",
    "Tunnel",
    "Volume",
    "Workspace",
    "__version__",
    "asgi_app",
    "batched",
    "billing",
    "concurrent",
    "current_attempt",
    "current_function_call_id",
    "current_input_id",
    "enable_output",
    "enter",
    "exception",
    "exit",
    "fastapi_endpoint",
    "forward",
    "interact",
    "is_local",
    "last_error",
    "method",
    "parameter",
    "web_endpoint",
    "web_server",
    "wsgi_app",
]
