"""Build the package from `settings.ini`, the one place that names its version and requirements."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(HERE / 'settings.ini', encoding='utf-8')
c = config['DEFAULT']
suffix = '_requirements'
extras = {key.removesuffix(suffix): value.split() for key, value in c.items() if key.endswith(suffix)}

setup(
    name=c['lib_name'],
    version=c['version'],
    description=c['description'],
    author=c['author'],
    keywords=c['keywords'],
    license='Apache-2.0',
    license_files=['LICENSE'],
    python_requires=f'>={c["min_python"]}',
    long_description=(HERE / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    packages=find_packages(include=[c['lib_name'], f'{c["lib_name"]}.*']),
    install_requires=c['requirements'].split(),
    extras_require=extras,
    package_data={c['lib_name']: ['py.typed', '*/*.pyi', '*/templates/*', '*/static/*']},
    entry_points={'console_scripts': c['console_scripts'].split()},
)
