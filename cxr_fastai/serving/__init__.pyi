from .app import make_app
from .server import serve
from .service import Limits, Service, Settings

__all__ = [
    'Limits',
    'Service',
    'Settings',
    'make_app',
    'serve',
]
