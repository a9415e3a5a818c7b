from .app import Settings, make_app
from .server import serve
from .service import Service
from .uploads import Limits

__all__ = [
    'Limits',
    'Service',
    'Settings',
    'make_app',
    'serve',
]
