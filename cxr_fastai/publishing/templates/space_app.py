"""A Gradio page to try the model: upload an image, get its probability of pneumonia and what influenced the score."""

import base64
from io import BytesIO
from pathlib import Path

import gradio as gr
from PIL import Image

from cxr_fastai.interpretation.overlays import CAVEAT
from cxr_fastai.serving.service import Service

service = Service.open(Path(__file__).parent / 'bundle')
NOTICE = (
    '**Research software, not a medical device.** It must not be used to diagnose anyone. Do not upload images from '
    'which a patient can be identified.'
)


def predict(path: str | None) -> tuple[str, Image.Image | None, Image.Image | None]:
    """Return the prediction as text, the image, and the image with its map."""
    if path is None:
        return '', None, None
    row = service.explain(Path(path).read_bytes())
    explanation = row['explanation'] or {'image': None, 'overlay': None, 'note': None}
    if row['status'] == 'ok':
        text = (
            f'### {row["prediction"].title()}: probability of pneumonia {row["p_pneumonia"]:.3f}\n'
            f'Classified as pneumonia at probability ≥ {row["threshold"]:.3g}.'
        )
    else:
        text = f'### No probability\n{row["message"]} ({row["code"]})'
    if explanation['note']:
        text += f'\n\n{explanation["note"]}'
    return text, decode_png(explanation['image']), decode_png(explanation['overlay'])


def decode_png(png: str | None) -> Image.Image | None:
    """Return the image of a base64 encoded PNG."""
    if png is None:
        return None
    return Image.open(BytesIO(base64.b64decode(png)))


with gr.Blocks(title='Chest X-ray images', delete_cache=(600, 600)) as demo:
    gr.Markdown(f'# Chest X-ray: normal or pneumonia\n{NOTICE}')
    with gr.Row():
        file = gr.File(label='Image: JPEG, PNG, TIFF or DICOM', type='filepath')
        result = gr.Markdown()
    with gr.Row():
        image = gr.Image(label='Image', format='png')
        overlay = gr.Image(label=f'Grad-CAM: {CAVEAT}', format='png')
    file.change(predict, file, [result, image, overlay])

if __name__ == '__main__':
    demo.launch(show_error=False, max_file_size='20mb')
