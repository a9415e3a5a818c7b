"""`python -m cxr_fastai` is the command `cxr-fastai`."""

from cxr_fastai.cli import run

if __name__ == '__main__':
    run()
