"""Build the package from `settings.ini`, the one place that names its version and requirements."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(HERE / 'settings.ini', encoding='utf-8')
settings = config['DEFAULT']
suffix = '_requirements'
extras = {key.removesuffix(suffix): value.split() for key, value in settings.items() if key.endswith(suffix)}

setup(
    name=settings['lib_name'],
    version=settings['version'],
    description=settings['description'],
    author=settings['author'],
    keywords=settings['keywords'],
    license='Apache-2.0',
    license_files=['LICENSE'],
    python_requires=f'>={settings["min_python"]}',
    long_description=(HERE / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    packages=find_packages(include=[settings['lib_name'], f'{settings["lib_name"]}.*']),
    install_requires=settings['requirements'].split(),
    extras_require=extras,
    package_data={
        settings['lib_name']: ['py.typed', '*/*.pyi', '*/templates/*', '*/static/*', 'pretrained/*', 'pretrained.json']
    },
    entry_points={'console_scripts': settings['console_scripts'].split()},
)
