# CUDA's runtime and the driver's hooks; torch's wheels bring cuBLAS and cuDNN themselves.
FROM nvidia/cuda:12.8.1-runtime-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home fmdistill && install --directory --owner=fmdistill /opt/fmdistill /data

USER fmdistill
WORKDIR /opt/fmdistill
COPY --chown=fmdistill . .
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

# The README's install steps; a test keeps the two equal.
RUN python3 -m venv .venv
RUN .venv/bin/pip install '.[serve]'

# Images, caches and runs are mounted at /data. The user above has number 1001 (Ubuntu's image takes 1000), so take your
# own, which may write to your folder. With Docker's 64 MB of /dev/shm, threads load the images instead of processes;
# --ipc=host, or --shm-size=8g, gives them more:
#   docker run --gpus all --ipc=host --user "$(id -u):$(id -g)" -e HOME=/tmp -v "$PWD:/data" fmdistill run RECIPE
ENV PATH=/opt/fmdistill/.venv/bin:$PATH
WORKDIR /data
ENTRYPOINT ["fmdistill"]
CMD ["--help"]
