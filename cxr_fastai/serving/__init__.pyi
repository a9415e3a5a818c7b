from .app import Settings, make_app
from .server import Server, serve
from .service import Service
from .uploads import Limits

__all__ = [
    'Limits',
    'Server',
    'Service',
    'Settings',
    'make_app',
    'serve',
]
