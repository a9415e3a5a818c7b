"""Missing, odd and impossible elements of DICOM files: a sensible value with a note, or an error with the name."""

import numpy as np
import pytest
from imagefiles import DEEP, GREY, RAMP, dicom, encoded, with_text, within
from pydicom.encaps import encapsulate
from pydicom.uid import ImplicitVRLittleEndian, JPEGBaseline8Bit

from cxr_fastai.core.errors import ImageError, UsageError
from cxr_fastai.images.decode import decode_image, open_image, read_image
from cxr_fastai.images.decoder_pool import DecoderPool
from cxr_fastai.images.dicom_header import parse_modalities
from cxr_fastai.images.preprocessing import Preprocessing

CT, PROCESSING, CAPTURE = (f'1.2.840.10008.5.1.4.1.1.{end}' for end in ('2', '1.1.1', '7'))
WINDOWED = 255 * np.clip((DEEP.astype(float) - 1999) / 1000, 0, 1)
COLOUR = np.repeat(GREY[..., None], 3, 2)


def refusal(data: bytes, **options) -> tuple[str, str]:
    """Return the code and the message of the error that an image has."""
    with pytest.raises(ImageError) as caught:
        decode_image(data, **options)
    return caught.value.code, str(caught.value)


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('PixelRepresentation', 0),
        ('BitsStored', 12),
        ('HighBit', 11),
        ('SamplesPerPixel', 1),
        ('PhotometricInterpretation', 'MONOCHROME2'),
    ],
)
def test_a_missing_element_has_a_sensible_value_and_a_note(name, value):
    image = decode_image(dicom(**{name: None}))
    assert np.array_equal(image.pixels, decode_image(dicom()).pixels)
    assert image.notes[-1] == f'missing or contradictory in the file, so assumed: {name} {value}'


def test_all_elements_with_a_sensible_value_may_be_missing_at_once():
    names = ('PixelRepresentation', 'BitsStored', 'HighBit', 'SamplesPerPixel', 'PhotometricInterpretation')
    image = decode_image(dicom(**dict.fromkeys(names)))
    assert within(1, image.pixels, RAMP) and 'BitsStored 16, HighBit 15' in image.notes[-1]


@pytest.mark.parametrize('missing', [('PlanarConfiguration',), ('PlanarConfiguration', 'SamplesPerPixel')])
def test_colour_without_its_elements_is_read(missing):
    tags = {'PhotometricInterpretation': 'RGB', 'SamplesPerPixel': 3}
    image = decode_image(dicom(COLOUR, **tags | dict.fromkeys(missing[1:])))
    assert within(1, image.pixels, GREY) and 'PlanarConfiguration 0' in image.notes[-1]


def test_colour_without_a_photometric_interpretation_is_recognised_by_its_bytes():
    tags = {'PhotometricInterpretation': None, 'SamplesPerPixel': None}
    assert within(1, decode_image(dicom(COLOUR, **tags)).pixels, GREY)
    jpeg = encapsulate([encoded(COLOUR, 'JPEG', quality=95)])
    tags = {'PhotometricInterpretation': None, 'SamplesPerPixel': 3}
    assert within(3, decode_image(dicom(COLOUR, JPEGBaseline8Bit, jpeg, **tags)).pixels, GREY)


@pytest.mark.parametrize(
    ('tags', 'assumed'),
    [
        ({'BitsStored': 0}, 'BitsStored 12'),
        ({'BitsStored': 20, 'HighBit': None}, 'BitsStored 16, HighBit 15'),
        ({'HighBit': 99}, 'HighBit 11'),
        ({'PixelRepresentation': 7}, 'PixelRepresentation 0'),
        ({'PhotometricInterpretation': 'RGB'}, 'PhotometricInterpretation MONOCHROME2'),
    ],
)
def test_an_impossible_value_is_replaced_like_a_missing_one(tags, assumed):
    image = decode_image(dicom(**tags))
    assert within(1, image.pixels, RAMP) and image.notes[-1].endswith(assumed)


@pytest.mark.parametrize('text', ['monochrome2', 'MONOCHROME2\0', ' MONOCHROME2', 'MONOCHROME 2'])
def test_the_photometric_interpretation_may_be_written_in_another_way(text):
    image = decode_image(dicom(PhotometricInterpretation=text))
    assert image.mode == 'MONOCHROME2' and within(1, image.pixels, RAMP)


def test_eight_bits_of_a_jpeg_picture_prevail_over_the_elements():
    jpeg = encapsulate([encoded(GREY, 'JPEG', quality=95)])
    image = decode_image(dicom(GREY, JPEGBaseline8Bit, jpeg, BitsAllocated=16, BitsStored=12, HighBit=11))
    assert within(3, image.pixels, GREY) and 'BitsAllocated 8' in image.notes[-1]


@pytest.mark.parametrize(
    ('tags', 'message'),
    [
        ({'Rows': None}, r'the element Rows (0028,0010) is missing'),
        ({'Columns': None}, r'the element Columns (0028,0011) is missing'),
        ({'BitsAllocated': None}, r'the element BitsAllocated (0028,0100) is missing'),
        ({'Rows': 0}, r'the element Rows (0028,0010) is 0'),
        ({'BitsAllocated': 12}, 'BitsAllocated 12: not one of'),
        ({'SamplesPerPixel': 2}, 'SamplesPerPixel 2: 1 or 3'),
        ({'Rows': 97}, 'PixelData has 15,360 bytes, but 80x97 pixels need 15,520'),
    ],
)
def test_an_element_that_cannot_be_guessed_is_named(tags, message):
    code, text = refusal(dicom(**tags))
    assert code == 'E_DICOM_CORRUPT' and message in text and 'Error' not in text


@pytest.mark.parametrize('data', [b'', None])
def test_missing_pixels_are_named(data):
    image = dicom(data=b'') if data == b'' else with_text('PixelData', None)
    code, text = refusal(image)
    assert code == 'E_DICOM_NOPIXEL' and 'PixelData is missing or empty' in text


@pytest.mark.parametrize(
    ('centre', 'width'),
    [
        ('2500,0', '1001'),
        ('2500,0', '1001,0'),
        ('2500\\', '1001'),
        ('2500\\', '1001\\'),
        ('[02500, 02500]', '[01001, 01001]'),
        ('[2500]', '(1001)'),
        ("['2500', '1']", "['1001', '2']"),
        ('2500, 1, 1', '1001, 2, 2'),
        ('\\2500', '7\\1001'),
        ('abc\\2500', '7\\1001'),
        ('2500;1', '1001;2'),
        ('2.5e3', '+1001'),
        ('2500\0', '"1001"'),
    ],
)
def test_numbers_of_a_window_are_read_as_programs_write_them(centre, width):
    image = decode_image(with_text('WindowWidth', width, with_text('WindowCenter', centre)))
    assert within(1, image.pixels, WINDOWED) and image.notes[0] == 'window of the file: centre 2500, width 1001'


@pytest.mark.parametrize('text', ['none', 'nan', '2500 HU', '--'])
def test_a_window_that_cannot_be_read_is_ignored_with_a_note(text):
    image = decode_image(with_text('WindowCenter', text, dicom(WindowCenter=2500, WindowWidth=1001)))
    assert within(1, image.pixels, RAMP)
    assert image.notes == ('window 1014 to 3985, 0.5% to 99.5% of the pixels', 'not readable, so ignored: WindowCenter')


def test_rescaling_is_read_with_a_decimal_comma():
    window = dicom(WindowCenter=5000, WindowWidth=2002, RescaleSlope=1, RescaleIntercept=0)
    image = decode_image(with_text('RescaleSlope', '2,0', window))
    assert within(1, image.pixels, WINDOWED)


def test_an_unreadable_intercept_is_zero():
    window = dicom(WindowCenter=2500, WindowWidth=1001, RescaleSlope=1, RescaleIntercept=7)
    image = decode_image(with_text('RescaleIntercept', 'none', window))
    assert within(1, image.pixels, WINDOWED) and 'RescaleIntercept is missing, so assumed to be 0' in image.notes


def test_a_negative_slope_without_intercept_inverts():
    assert within(1, decode_image(dicom(RescaleSlope=-1)).pixels, RAMP[::-1, ::-1])


@pytest.mark.parametrize('text', ['x', '1,0', '0', ' 1', '', '[1]'])
def test_a_number_of_frames_that_cannot_be_read_counts_as_one(text):
    assert within(1, decode_image(with_text('NumberOfFrames', text)).pixels, RAMP)


@pytest.mark.parametrize('text', ['2\0', '2,0', '[2]'])
def test_several_frames_are_recognised_in_any_writing(text):
    assert refusal(with_text('NumberOfFrames', text)) == ('E_MULTIFRAME', '2 frames')


def test_padding_that_is_no_number_is_ignored():
    assert within(1, decode_image(with_text('PixelPaddingValue', 'none')).pixels, RAMP)


def test_implicit_elements_do_not_need_the_pixel_representation():
    padded = DEEP.copy()
    padded[:10] = 4095
    image = dicom(padded, ImplicitVRLittleEndian, PixelPaddingValue=4095)
    other = image.replace(b'\x28\0\x03\1\2\0\0\0', b'\x28\0\x04\1\2\0\0\0')  # the tag of another element
    assert other != image and np.array_equal(decode_image(other).pixels, decode_image(image).pixels)


@pytest.mark.parametrize(
    ('sop_class', 'note'),
    [
        ('1.2.840.10008.5.1.4.1.1.1', 'Modality is missing: CR according to the SOP class'),
        ('1.2.840.10008.5.1.4.1.1.1.1', 'Modality is missing: DX according to the SOP class'),
        (PROCESSING, 'Modality is missing: DX according to the SOP class'),
        (CAPTURE, 'Modality is missing, and the SOP class does not say that the image is a radiograph'),
        (None, 'Modality is missing: DX according to the SOP class'),  # that of the file header
    ],
)
@pytest.mark.parametrize('missing', [None, ''])
def test_the_sop_class_replaces_a_missing_modality(sop_class, note, missing):
    image = decode_image(dicom(Modality=missing, SOPClassUID=sop_class))
    assert note in image.notes and within(1, image.pixels, RAMP)


def test_a_missing_modality_of_another_sop_class_is_refused():
    code, text = refusal(dicom(Modality=None, SOPClassUID=CT))
    assert code == 'E_DICOM_MODALITY' and 'modality CT' in text


@pytest.mark.parametrize('modality', ['CR', 'DX', 'DR', 'dx', 'DX '])
def test_modalities_of_radiographs_are_read_without_a_note(modality):
    assert len(decode_image(dicom(Modality=modality)).notes) == 1


def test_another_modality_is_refused_unless_it_is_accepted(tmp_path):
    code, text = refusal(dicom(Modality='RG'))
    assert code == 'E_DICOM_MODALITY'
    assert text == 'modality RG: only CR, DR, DX are accepted. --modality RG accepts it too'
    assert within(1, decode_image(dicom(Modality='RG'), modality='CT,RG').pixels, RAMP)
    assert within(1, decode_image(dicom(Modality='RG'), Preprocessing(64, modality='RG')).pixels, RAMP)
    assert 'only CR, DR, DX, MR are accepted' in refusal(dicom(Modality='RG'), modality='MR')[1]
    (tmp_path / 'a.dcm').write_bytes(dicom(Modality='RG'))
    assert within(1, read_image(tmp_path / 'a.dcm', modality='RG'), RAMP)
    with pytest.raises(ImageError):
        read_image(tmp_path / 'a.dcm')


def test_the_accepted_modalities_reach_the_processes_that_decode(tmp_path):
    (tmp_path / 'a.dcm').write_bytes(dicom(Modality='MR'))
    with DecoderPool(1) as pool:
        assert within(1, open_image(tmp_path / 'a.dcm', decode=pool.decode, modality='MR').pixels, RAMP)
        assert pool.decode(dicom(Modality='MR'), Preprocessing(64, modality='CT,MR')).square.shape == (64, 64)
        with pytest.raises(ImageError, match='modality MR'):
            open_image(tmp_path / 'a.dcm', decode=pool.decode)


def test_a_document_is_refused_without_advice_to_accept_it():
    assert '--modality' not in refusal(with_text('PixelData', None, dicom(Modality='SR')))[1]


def test_a_list_of_modalities_is_checked():
    assert (
        parse_modalities('') == () and parse_modalities('RG') == ('RG',) and parse_modalities('CT,MR') == ('CT', 'MR')
    )
    for text in ('ct', 'CT, MR', 'CT;MR', ',', 'C', 'Doe^Jane', '*'):
        with pytest.raises(UsageError, match='not DICOM modalities. Give their codes, separated by commas'):
            parse_modalities(text)
        with pytest.raises(UsageError):
            Preprocessing(64, modality=text)
