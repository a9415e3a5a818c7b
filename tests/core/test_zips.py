"""The directory of a zip file is bounded, wherever `zipfile` would find it."""

import io
import struct
import zipfile

import pytest

from cxr_fastai.core.zips import check_zip

LIMITS = {'max_entries': 10, 'max_bytes': 2000}
LARGE_END = struct.Struct('<4sQ2H2I4Q')
LOCATOR = struct.Struct('<4sIQI')


def zip_of(count: int, comment: bytes = b'', name: str = 'a') -> bytes:
    """Return a zip file of `count` empty files."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as archive:
        for number in range(count):
            archive.writestr(f'{name}{number}', b'')
        archive.comment = comment
    return file.getvalue()


def problem(data: bytes) -> str:
    """Return why the zip file is refused, or nothing."""
    file = io.BytesIO(data)
    try:
        check_zip(file, **LIMITS)
    except ValueError as error:
        return str(error)
    assert file.tell() == 0
    return ''


def with_large_records(data: bytes, position: int = 0, size: int | None = None) -> bytes:
    """Return the zip file with the records of one over 4 GB; `position` is added to that in the locator."""
    end = data.rindex(b'PK\5\6')
    count, directory_bytes, start = struct.unpack_from('<10xHII', data, end)
    size = directory_bytes if size is None else size
    record = LARGE_END.pack(b'PK\6\6', 44, 45, 45, 0, 0, count, count, size, start)
    locator = LOCATOR.pack(b'PK\6\7', 0, end + position, 1)
    rest = data[end : end + 8] + struct.pack('<HHII', 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1) + data[end + 20 :]
    return data[:end] + record + locator + rest


@pytest.mark.parametrize('comment', [b'', b'a comment', b'PK\1\2' * 100, b'c' * 65_535])
@pytest.mark.parametrize('large', [False, True])
def test_files_are_counted(comment, large):
    for count in (0, 1, 10, 11, 30):
        data = zip_of(count, comment)
        data = with_large_records(data) if large else data
        assert len(zipfile.ZipFile(io.BytesIO(data)).namelist()) == count
        assert problem(data) == ('more than 10 entries' if count > 10 else '')


def test_a_long_directory_is_refused_before_it_is_read():
    data = zip_of(10, name='n' * 500)
    assert 'bytes is over 2,000' in problem(data)
    assert 'bytes is over 2,000' in problem(with_large_records(zip_of(2), size=2**40))


def test_the_number_of_files_in_the_last_record_does_not_count():
    data = bytearray(zip_of(30))
    data[-14:-10] = struct.pack('<HH', 1, 1)
    assert len(zipfile.ZipFile(io.BytesIO(data)).namelist()) == 30
    assert problem(bytes(data)) == 'more than 10 entries'


def test_records_of_64_bits_that_do_not_match_are_refused():
    assert problem(with_large_records(zip_of(2), position=-5)) == 'its records of 64 bits do not match'
    assert problem(with_large_records(zip_of(2)).replace(b'PK\6\6', b'PK\6\0')) == 'its records of 64 bits do not match'


def test_a_file_with_bytes_before_the_zip_is_counted():
    assert problem(b'program' * 100 + zip_of(11)) == 'more than 10 entries'


@pytest.mark.parametrize('data', [b'', b'PK', b'PK\5\6', bytes(100_000), zip_of(3)[:-1], b'PK\5\6' + b'\xff' * 18])
def test_other_files_are_left_to_zipfile(data):
    try:
        check_zip(io.BytesIO(data), **LIMITS)
    except ValueError as error:
        assert 'is over' in str(error)
    with pytest.raises(zipfile.BadZipFile):
        zipfile.ZipFile(io.BytesIO(data))
