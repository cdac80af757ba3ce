# docker build -t rhc . && docker run --rm -v $PWD/runs:/work/runs rhc train --window 50
FROM python:3.11-slim
RUN pip install --no-cache-dir torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
COPY . /src
RUN apt-get update && apt-get install -y --no-install-recommends git && \
    pip install --no-cache-dir -c /src/constraints.txt '/src[report,runners]' && rm -rf /src
WORKDIR /work
ENTRYPOINT ["rhc"]
