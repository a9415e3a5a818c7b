from .architectures import (
    ARCHS,
    BaselineCNN,
    add_arch,
    build_model,
    describe_network,
    find_arch,
    make_recipe,
    revise_recipe,
)
from .bodies import cut_body
from .inputs import denormalize, normalize, to_input
from .networks import Network, create_network
from .registry import Arch

__all__ = [
    'ARCHS',
    'Arch',
    'BaselineCNN',
    'Network',
    'add_arch',
    'build_model',
    'create_network',
    'cut_body',
    'denormalize',
    'describe_network',
    'find_arch',
    'make_recipe',
    'normalize',
    'revise_recipe',
    'to_input',
]
