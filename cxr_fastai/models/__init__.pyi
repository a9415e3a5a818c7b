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
from .ensembles import make_ensemble
from .inputs import denormalize, normalize, to_input
from .networks import Network, create_network
from .registry import Arch
from .soups import average_networks

__all__ = [
    'ARCHS',
    'Arch',
    'BaselineCNN',
    'Network',
    'add_arch',
    'average_networks',
    'build_model',
    'create_network',
    'cut_body',
    'denormalize',
    'describe_network',
    'find_arch',
    'make_ensemble',
    'make_recipe',
    'normalize',
    'revise_recipe',
    'to_input',
]
