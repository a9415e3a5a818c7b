"""A page to try the model: one image, its probability, and what influenced it."""

import base64
from io import BytesIO
from pathlib import Path

import gradio as gr
from PIL import Image

from cxr_fastai.interpretation.overlays import CAVEAT
from cxr_fastai.serving.service import Service

service = Service.open(Path(__file__).parent / 'bundle')
NOTICE = (
    '**Research software, not a medical device.** It must not be used to diagnose anybody. Send no image of a '
    'patient who could be recognised.'
)


def judge(path: str | None) -> tuple[str, Image.Image | None, Image.Image | None]:
    """The decision in words, the image, and the image under its map."""
    if path is None:
        return '', None, None
    row = service.answer(Path(path).read_bytes())
    shown = row['explanation'] or {'image': None, 'overlay': None, 'note': None}
    if row['status'] == 'ok':
        words = (
            f'### {row["prediction"].title()}: probability of pneumonia {row["p_pneumonia"]:.3f}\n'
            f'called pneumonia from {row["threshold"]:.3g} on'
        )
    else:
        words = f'### No probability\n{row["message"]} ({row["code"]})'
    return '\n\n'.join(filter(None, [words, shown['note']])), _picture(shown['image']), _picture(shown['overlay'])


def _picture(png: str | None) -> Image.Image | None:
    return png and Image.open(BytesIO(base64.b64decode(png)))


with gr.Blocks(title='Chest images', delete_cache=(600, 600)) as demo:
    gr.Markdown(f'# Normal or pneumonia, on a chest image\n{NOTICE}')
    with gr.Row():
        chosen = gr.File(label='An image: JPEG, PNG, TIFF or DICOM', type='filepath')
        words = gr.Markdown()
    with gr.Row():
        image = gr.Image(label='image', format='png')
        overlay = gr.Image(label=f'Grad-CAM: {CAVEAT}', format='png')
    chosen.change(judge, chosen, [words, image, overlay])

if __name__ == '__main__':
    demo.launch(show_error=False, max_file_size='20mb')
