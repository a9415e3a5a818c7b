# A container that serves a bundle, without root, compiler or fastai. The bundle is mounted, not copied into the image:
#   docker build -t cxr-fastai .
#   docker run --read-only --tmpfs /tmp --cap-drop ALL -p 127.0.0.1:8000:8000 -v "$PWD/bundle:/bundle:ro" cxr-fastai
FROM python:3.12-slim AS build
WORKDIR /source
RUN python -m venv /venv
COPY constraints.txt ./
# MAPS=0 leaves out torch (1 GB). Predictions work without it, but maps of what influenced a score do not.
ARG MAPS=1
RUN /venv/bin/pip install --no-cache-dir -c constraints.txt \
        numpy pillow rich typer jinja2 lazy-loader tqdm safetensors filelock pydicom pyjpegls highdicom onnxruntime \
        fastapi hypercorn python-multipart prometheus-client && \
    if [ "$MAPS" = 1 ]; then /venv/bin/pip install --no-cache-dir -c constraints.txt matplotlib torch torchvision \
        --extra-index-url https://download.pytorch.org/whl/cpu; fi
COPY settings.ini setup.py pyproject.toml README.md LICENSE ./
COPY cxr_fastai cxr_fastai
RUN /venv/bin/pip install --no-cache-dir --no-deps .

FROM python:3.12-slim
RUN useradd --system --uid 10001 --no-create-home cxr
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 MPLCONFIGDIR=/tmp/matplotlib
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=3s --start-period=10s CMD ["python", "-c", \
    "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready', timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["cxr-fastai", "serve", "/bundle", "--host", "0.0.0.0"]
