"""Hostile requests: bodies, headers, framing, protocols and images that try to stop the service or confuse a proxy."""

import re
import shutil
import struct
from contextlib import suppress

import numpy as np
import pytest
from bundlefiles import seal
from imagefiles import GREY, encoded
from services import (
    HEALTH,
    LOCAL,
    connected,
    files,
    form,
    is_closed,
    is_error,
    is_ready,
    post,
    predict,
    read_reply,
    request_for,
    request_head,
    running_app,
    running_server,
    send,
    wait_until,
)

from cxr_fastai.images.decoder_pool import DecoderPool
from cxr_fastai.inference.bundle import CARD, Bundle
from cxr_fastai.publishing.hub import write_space
from cxr_fastai.serving.app import Settings
from cxr_fastai.serving.server import Server
from cxr_fastai.serving.uploads import Limits

IMAGE = encoded(GREY)
BODY = form(IMAGE)
MEGABYTE = 2**20
READABLE = (None, 'E_OUT_OF_DISTRIBUTION')
"""Codes of images that were decoded and predicted."""


@pytest.fixture(scope='module')
def client(bundle):
    with running_app(Settings(bundle)) as client:
        yield client


@pytest.fixture(scope='module')
def server(bundle):
    with running_server(Server(Settings(bundle, port=0, drain_seconds=0.2))) as server:
        yield server


# Framing

CHUNKED = b'%x\r\n%b\r\n0\r\n\r\n' % (len(BODY), BODY)
TWO_LENGTHS = {
    'Content-Length first': request_head(f'Content-Length: {len(CHUNKED)}', 'Transfer-Encoding: chunked') + CHUNKED,
    'Content-Length last': request_head('Transfer-Encoding: chunked', f'Content-Length: {len(CHUNKED)}') + CHUNKED,
    'Content-Length 0': request_head('Transfer-Encoding: chunked', 'Content-Length: 0') + CHUNKED,
}


@pytest.mark.parametrize('kind', TWO_LENGTHS)
def test_a_request_with_two_lengths_is_refused_and_no_second_request_is_read_from_it(server, kind):
    with connected(server.port, TWO_LENGTHS[kind] + HEALTH) as connection:
        status, error, headers = read_reply(connection)
        assert (status, error['code'], headers['connection']) == (400, 'E_FRAMING', 'close')
        wait_until(lambda: is_closed(connection))


def test_a_get_request_with_two_lengths_is_refused_too(server):
    head = f'GET /health HTTP/1.1\r\nHost: {LOCAL}\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n'
    with connected(server.port, head.encode() + HEALTH) as connection:
        assert read_reply(connection)[0] == 400
        wait_until(lambda: is_closed(connection))


def test_chunks_and_a_length_alone_are_still_accepted(server):
    assert send(server.port, request_head('Transfer-Encoding: chunked') + CHUNKED)[0] == 200
    assert send(server.port, request_for(IMAGE))[0] == 200


ODD_FRAMING = {
    'chunks in HTTP/1.0': request_head('Transfer-Encoding: chunked').replace(b'HTTP/1.1', b'HTTP/1.0') + CHUNKED,
    'chunked twice': request_head('Transfer-Encoding: chunked, chunked') + CHUNKED,
    'chunked with a space before the colon': request_head('Transfer-Encoding : chunked') + CHUNKED,
    'chunk size of 40 digits': request_head('Transfer-Encoding: chunked') + b'0' * 40 + CHUNKED,
    'negative chunk size': request_head('Transfer-Encoding: chunked') + b'-1\r\n\r\n',
    'folded header': request_head('X: a\r\n b: c', f'Content-Length: {len(BODY)}') + BODY,
    'length with a sign': request_head(f'Content-Length: +{len(BODY)}') + BODY,
    '10,000 headers': request_head(*['X: y'] * 10_000),
    'chunk extension of 1 MB': request_head('Transfer-Encoding: chunked') + b'1;' + b'x' * MEGABYTE,
    'trailers of 1 MB': request_head('Transfer-Encoding: chunked') + b'0\r\n' + b'X: ' + b'x' * MEGABYTE,
}


@pytest.mark.parametrize('kind', ODD_FRAMING)
def test_odd_framing_gets_an_answer_or_is_cut_and_never_stops_the_service(server, kind):
    with connected(server.port) as connection, suppress(OSError):  # the connection is cut while the client sends
        connection.sendall(ODD_FRAMING[kind])
        assert read_reply(connection)[0] in (200, 400, 422, 431, 501)
    assert is_ready(server.port)


# Protocols

HTTP2_PREFACE = b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n'
HEADERS_FRAME, RESET_FRAME, SETTINGS_FRAME = 1, 3, 4
END_STREAM_AND_HEADERS = 5


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """A frame of HTTP/2."""
    return struct.pack('>I', len(payload))[1:] + bytes((kind, flags)) + struct.pack('>I', stream) + payload


def http2_request(stream: int) -> bytes:
    """A GET request for /ready, without compression of its headers."""
    fields = ((b':method', b'GET'), (b':scheme', b'http'), (b':path', b'/ready'), (b':authority', LOCAL.encode()))
    block = b''.join(b'\0' + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in fields)
    return frame(HEADERS_FRAME, END_STREAM_AND_HEADERS, stream, block)


def test_http2_is_refused(server):
    with connected(server.port, HTTP2_PREFACE, frame(SETTINGS_FRAME, 0, 0, b''), http2_request(1)) as connection:
        received = b''
        while b'E_HTTP_VERSION' not in received:
            received += connection.recv(2**16)
            assert received
    assert is_ready(server.port)


def test_streams_of_http2_that_are_reset_at_once_do_not_stop_the_service(server):
    """The attack "rapid reset": each stream costs the client a few bytes, and the server a request."""
    attack = b''.join(
        http2_request(stream) + frame(RESET_FRAME, 0, stream, struct.pack('>I', 8)) for stream in range(1, 4000, 2)
    )
    with connected(server.port, HTTP2_PREFACE, frame(SETTINGS_FRAME, 0, 0, b'')) as connection:
        connection.settimeout(1)
        with suppress(OSError):  # the connection is cut
            connection.sendall(attack)
        assert post(server.port, IMAGE)[0] == 200


def test_an_upgrade_to_http2_gets_no_more_than_a_refusal(server):
    lines = ('Connection: Upgrade, HTTP2-Settings', 'Upgrade: h2c', 'HTTP2-Settings: AAMAAABkAAQAAP__')
    head = '\r\n'.join(('GET /v1/model HTTP/1.1', f'Host: {LOCAL}', *lines, '', ''))
    with connected(server.port, head.encode(), HTTP2_PREFACE, frame(SETTINGS_FRAME, 0, 0, b'')) as connection:
        connection.settimeout(2)
        assert b'"arch"' not in connection.recv(2**16)
    assert is_ready(server.port)


def test_a_range_of_a_static_file_is_bounded_by_the_file(client):
    ranges = ','.join(f'{start}-' for start in range(2000))
    response = client.get('/static/serve.css', headers={'range': f'bytes={ranges}'})
    assert response.status_code in (200, 206, 400, 416)
    assert len(response.content) < 100 * len(client.get('/static/serve.css').content)


# Forms

SLOW_TO_SPLIT = {
    'line feeds': b'\n',
    'carriage returns': b'\r',
    'nearly the boundary': b'\r\n--b' * 3 + b'a',
    'dashes': b'-',
    'parts without end': b'\r\n--b\r\n',
}


@pytest.fixture(scope='module')
def hurried(bundle):
    """A service that parses a form for at most two seconds."""
    with running_app(Settings(bundle, limits=Limits(parse_seconds=2))) as client:
        yield client


@pytest.mark.parametrize('kind', SLOW_TO_SPLIT)
def test_a_body_of_the_largest_size_is_parsed_in_time_whatever_it_consists_of(hurried, kind):
    piece = SLOW_TO_SPLIT[kind]
    body = form(piece * (19 * MEGABYTE // len(piece)))
    response = hurried.post('/v1/predict', content=body, headers={'content-type': 'multipart/form-data; boundary=ba'})
    assert response.status_code == 400
    response = hurried.post('/v1/predict', content=body, headers={'content-type': 'multipart/form-data; boundary=b'})
    assert response.status_code in (200, 400)


def test_a_form_that_takes_too_long_is_refused(bundle):
    with running_app(Settings(bundle, limits=Limits(parse_seconds=0))) as client:
        assert is_error(client.post('/v1/predict', files=files(IMAGE)), 413, 'E_FORM')


@pytest.mark.parametrize('charset', ['punycode', 'idna', 'unicode_escape', 'undefined', 'utf-16', 'x' * 9000])
def test_the_character_set_of_a_form_is_ignored(hurried, charset):
    """A field of 1 MB in `punycode` stopped the service for 35 s."""
    name = 'images'
    field = b'--b\r\nContent-Disposition: form-data; name="x-"\r\n\r\nx-%b\r\n' % (b'a' * 60_000)
    headers = {'content-type': f'multipart/form-data; boundary=b; charset={charset}'}
    response = hurried.post('/v1/predict', content=field + form(IMAGE, name=name), headers=headers)
    assert response.status_code == 200 and response.json()['images'][0]['code'] in READABLE


HOSTILE_FORMS = {
    'boundary of 71 characters': ({'content-type': f'multipart/form-data; boundary={"b" * 71}'}, BODY),
    'boundary of 1 MB': ({'content-type': f'multipart/form-data; boundary={"b" * 8000}'}, BODY),
    'boundary with a line feed': ({'content-type': 'multipart/form-data; boundary="b\\nc"'}, BODY),
    'empty boundary': ({'content-type': 'multipart/form-data; boundary='}, BODY),
    'field of 1 MB': (
        {},
        b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n' + b'x' * MEGABYTE + b'\r\n' + BODY,
    ),
    'header of 1 MB': (
        {},
        b'--b\r\nContent-Disposition: form-data; name="' + b'x' * MEGABYTE + b'"\r\n\r\n\r\n--b--\r\n',
    ),
    '1000 headers of a part': ({}, b'--b\r\n' + b'X: y\r\n' * 1000 + b'\r\n\r\n--b--\r\n'),
    'nested form': (
        {},
        b'--b\r\nContent-Type: multipart/mixed; boundary=c\r\nContent-Disposition: form-data; name="images"\r\n\r\n'
        b'--c\r\nContent-Disposition: file; filename="f"\r\n\r\nx\r\n--c--\r\n\r\n--b--\r\n',
    ),
}


@pytest.mark.parametrize('kind', HOSTILE_FORMS)
def test_a_hostile_form_gets_an_error(client, kind):
    headers, body = HOSTILE_FORMS[kind]
    response = client.post(
        '/v1/predict', content=body, headers={'content-type': 'multipart/form-data; boundary=b'} | headers
    )
    assert response.status_code in (400, 413, 422), response.text
    assert set(response.json()) == {'code', 'message'}


# Images

SLOW = encoded(np.tile(np.arange(0, 64_000, 10, np.uint16), (6200, 1)))
"""A picture of 92 kB that takes a second, and 700 MB of memory."""


def test_images_of_a_request_that_are_too_slow_time_out_alone(bundle):
    with running_app(Settings(bundle, decode_seconds=0.3)) as client:
        slow, quick = predict(client, SLOW, IMAGE)
    assert (slow['status'], slow['code']) == ('error', 'E_TIMEOUT') and quick['code'] in READABLE


def test_memory_bombs_are_refused_alone(bundle):
    bomb = encoded(np.tile(GREY, (60, 60)))
    with running_app(Settings(bundle, decode_memory=200 * MEGABYTE)) as client:
        large, other = predict(client, bomb, IMAGE)
    assert (large['status'], large['code']) == ('rejected', 'E_TOO_LARGE') and other['code'] in READABLE


def test_clients_that_leave_before_their_slow_images_are_decoded_cost_nothing_lasting(server):
    for _ in range(20):
        with connected(server.port, request_for(SLOW)):
            pass
    assert post(server.port, IMAGE)[0] == 200
    wait_until(lambda: server.service.active_requests == 0)


def test_a_service_leaves_no_decoder_behind(bundle):
    settings = Settings(bundle, port=0)
    with running_server(Server(settings)) as running:
        assert post(running.port, IMAGE)[0] == 200
        pool = running.service.decoding
    assert isinstance(pool, DecoderPool) and pool.submit(IMAGE).cancelled()


# Model cards


@pytest.fixture(scope='module')
def card_bundle(bundle, tmp_path_factory):
    """A bundle with a card in Latin-1 that has a table, and markup in a heading."""
    copy = tmp_path_factory.mktemp('card') / 'bundle'
    shutil.copytree(bundle, copy)
    table = '| a | b | c |\n|:--|--:|:-:|\n| x | 1 | 2 |\n\n<script>alert(1)</script> [x](javascript:alert(1))\n'
    (copy / CARD).write_bytes(f'# M\xfcnchen\n\n## <b>`Use`</b>\n\n{table}'.encode('latin-1'))
    seal(copy)
    return copy


def test_a_card_that_is_not_utf8_is_shown_with_replacement_characters_and_aligned_tables(card_bundle):
    with running_app(Settings(card_bundle)) as client:
        response = client.get('/card')
    assert response.status_code == 200 and '<h1>M\ufffdnchen</h1>' in response.text
    assert re.findall(r'<td class="(\w+)">', response.text) == ['left', 'right', 'center']
    assert '<script>alert' not in response.text and 'href="javascript' not in response.text
    assert '<a href="#section-1">&lt;b&gt;Use&lt;/b&gt;</a>' in response.text


def test_a_card_that_is_not_utf8_does_not_prevent_a_space(card_bundle, tmp_path):
    space = write_space(Bundle.open(card_bundle), tmp_path / 'space')
    assert 'M\ufffdnchen' in (space / 'README.md').read_text(encoding='utf-8')


@pytest.mark.parametrize('piece', ['[', '![', 'a|b\n', '> ', '*a '])
def test_a_giant_card_is_shown_as_text(bundle, tmp_path, piece):
    shutil.copytree(bundle, tmp_path / 'bundle')
    (tmp_path / 'bundle' / CARD).write_text('a|b\n-|-\n' + piece * MEGABYTE, encoding='utf-8')
    seal(tmp_path / 'bundle')
    with running_app(Settings(tmp_path / 'bundle')) as client:
        response = client.get('/card')
    assert response.status_code == 200 and '<pre tabindex="0">a|b' in response.text
