from .architectures import (
    ARCHS,
    Arch,
    BaselineCNN,
    build_model,
    describe_network,
    find_arch,
    make_recipe,
    revise_recipe,
)
from .inputs import denormalize, normalize, to_input

__all__ = [
    'ARCHS',
    'Arch',
    'BaselineCNN',
    'build_model',
    'denormalize',
    'describe_network',
    'find_arch',
    'make_recipe',
    'normalize',
    'revise_recipe',
    'to_input',
]
