"""Run the command line by `python -m cxr_fastai`."""

from cxr_fastai.cli import run

if __name__ == '__main__':
    run()
