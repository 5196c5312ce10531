# Serves an index, or makes one of a folder first. CPU only, no torch; nobody is root in it.
#   docker build -t samething .
#   docker run -p 8000:8000 -e SAMETHING_TOKEN=… -v ./index:/index samething
#   docker run -p 8000:8000 -e SAMETHING_TOKEN=… -v ./index:/index -v ./photos:/photos:ro -v ./model:/model:ro samething
FROM python:3.12-slim AS built
ARG EXTRAS=serve
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN python -m venv /venv && /venv/bin/python -m pip install --no-cache-dir ".[$EXTRAS]"

FROM python:3.12-slim
COPY --from=built /venv /venv
COPY docker/serve /usr/local/bin/serve
RUN useradd --create-home --uid 10001 samething && mkdir /index && chown samething /index
USER samething
ENV PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1
VOLUME /index
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["serve"]
