"""Forms that are not valid, or over a limit, get an error with a code, without reading more than the limit."""

import pytest
from services import files, form, is_error, predict, running_app

from cxr_fastai.serving.app import Settings
from cxr_fastai.serving.uploads import Limits

MULTIPART = {'content-type': 'multipart/form-data; boundary=b'}
FIELD = b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n\r\n'
END = b'--b--\r\n'
FORMS = {
    'no boundary': (b'', {'content-type': 'multipart/form-data'}, 400, 'E_FORM'),
    'another boundary': (form(b'x'), {'content-type': 'multipart/form-data; boundary=c'}, 400, 'E_FORM'),
    'no content type': (form(b'x'), {}, 415, 'E_MEDIA_TYPE'),
    'JSON': (b'{}', {'content-type': 'application/json'}, 415, 'E_MEDIA_TYPE'),
    'compressed': (form(b'x'), MULTIPART | {'content-encoding': 'gzip'}, 415, 'E_ENCODING'),
    'empty body': (b'', MULTIPART, 422, 'E_NO_IMAGES'),
    'empty form': (form(), MULTIPART, 422, 'E_NO_IMAGES'),
    'truncated part': (form(b'x').removesuffix(END)[:-3], MULTIPART, 422, 'E_CUT'),
    'truncated second part': (form(b'x', b'y').removesuffix(END), MULTIPART, 422, 'E_CUT'),
    'text instead of an image': (FIELD.replace(b'x', b'images') + END, MULTIPART, 422, 'E_NO_IMAGES'),
    'part without a name': (b'--b\r\nContent-Disposition: form-data\r\n\r\n\r\n' + END, MULTIPART, 400, 'E_FORM'),
    'invalid header': (b'--b\r\n\x00\xff\r\n\r\n' + END, MULTIPART, 400, 'E_FORM'),
    '65 images': (form(*[b'x'] * 65), MULTIPART, 413, 'E_TOO_MANY'),
    '1001 images': (form(*[b'x'] * 1001), MULTIPART, 413, 'E_TOO_MANY'),
    '100,000 fields': (FIELD * 10**5 + END, MULTIPART, 413, 'E_TOO_MANY'),
}


@pytest.mark.parametrize('kind', FORMS)
def test_an_invalid_form_gets_an_error_with_a_code(client, kind):
    content, headers, status, code = FORMS[kind]
    assert is_error(client.post('/v1/predict', content=content, headers=headers), status, code)


def test_sixty_four_images_are_accepted(client):
    assert len(predict(client, *[b''] * 64)) == 64


@pytest.fixture(scope='module')
def small_limit(bundle):
    with running_app(Settings(bundle, limits=Limits(body=10_000))) as client:
        yield client


@pytest.mark.parametrize('announced', [True, False])
def test_a_body_over_the_limit_is_rejected_with_and_without_its_length(small_limit, announced):
    parts = [b'x' * 1000] * 40
    content = b''.join(parts) if announced else iter(parts)
    assert is_error(small_limit.post('/v1/predict', content=content, headers=MULTIPART), 413, 'E_BODY')
    assert small_limit.post('/v1/predict', files=files(b'x' * 9000)).status_code == 200
