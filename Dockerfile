# semid on CPU, from the core lock with hashes:
#     docker build -t registry.example/semid:0.1 .
# With extras of pyproject.toml, for docs/cluster (versions of the development lock where it has them, without hashes):
#     docker build --build-arg EXTRA=distributed -t registry.example/semid:0.1-distributed .
#     docker build --build-arg EXTRA=cuda13 -t registry.example/semid:0.1-cuda13 .
FROM python:3.12-slim

ARG EXTRA=""
ENV PATH=/opt/semid/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

WORKDIR /src
COPY requirements.lock requirements-dev.lock ./
RUN python -m venv /opt/semid && pip install --require-hashes -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY quantizers quantizers
COPY seq_models seq_models
COPY semid semid
RUN pip install --no-deps --no-build-isolation . \
    && if [ -n "$EXTRA" ]; then \
        grep == requirements-dev.lock | tr -d '\\' > versions.txt \
        && pip install --no-build-isolation --constraint versions.txt ".[$EXTRA]"; \
    fi \
    && pip check && rm -rf /src/*

# The libraries of CUDA come with the extra. Folders of data and runs are mounted, writable by this user.
RUN useradd --create-home --uid 1000 semid && mkdir /data /runs && chown semid /data /runs
USER semid
WORKDIR /home/semid
ENTRYPOINT ["semid"]
CMD ["--help"]
