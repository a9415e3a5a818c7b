from .anatomy import ANATOMY, exchange_surroundings
from .cache import ImageCache, find_cache, prepare
from .corruptions import CORRUPTIONS, corrupt
from .decode import ImageLike, decode_image, grey_array, open_image, read_image
from .limits import DecodedImage
from .preprocessing import Preprocessing
from .synthetic import make_demo

__all__ = [
    'ANATOMY',
    'CORRUPTIONS',
    'DecodedImage',
    'ImageCache',
    'ImageLike',
    'Preprocessing',
    'corrupt',
    'decode_image',
    'exchange_surroundings',
    'find_cache',
    'grey_array',
    'make_demo',
    'open_image',
    'prepare',
    'read_image',
]
