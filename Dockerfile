# The sidecar alone, to run beside any trainer. BASE_IMAGE: any Linux image with Python 3.11 or later and venv.
ARG BASE_IMAGE=python:3.13-slim

FROM ${BASE_IMAGE} AS build
WORKDIR /src
COPY pyproject.toml README.md requirements.lock ./
COPY ckpt_sidecar ckpt_sidecar
# pip stands in a place of its own and stays behind: what runs needs none.
RUN python3 -m venv /pip \
    && python3 -m venv --without-pip /venv \
    && /pip/bin/pip --python /venv/bin/python install --no-cache-dir --disable-pip-version-check \
        -c requirements.lock .

FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="ckpt-sidecar" \
      org.opencontainers.image.description="Uploads a training job's checkpoints to S3 while it trains, and restores the newest one on the next node." \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1

# Any user will do; it has to be the trainer's, since the sidecar links to the trainer's files.
USER 1000:1000

EXPOSE 22578
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:22578/healthz', timeout=4)"]
ENTRYPOINT ["ckpt-sidecar"]
