"""A cache in S3, as moto's server answers for it: what s3fs does differently from a folder.

Skipped where they are not installed: pip install s3fs 'moto[s3]' flask flask-cors. They pin each other's versions so
tightly that the environment of every test would pay for it.
"""

import re

import pytest
from test_cache_bucket import far, values

from fmdistill import cache, distill
from fmdistill.cache.store import opened
from fmdistill.registry import UserError

boto3 = pytest.importorskip("boto3")
s3fs = pytest.importorskip("s3fs")
ThreadedMotoServer = pytest.importorskip("moto.server").ThreadedMotoServer
KEY = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture
def server(monkeypatch):
    made = ThreadedMotoServer(port=0, verbose=False)
    made.start()
    host, port = made.get_host_and_port()
    for name, value in {**KEY, "AWS_MAX_ATTEMPTS": "1", "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="bucket")
    yield made
    made.stop()


def test_machines_share_a_bucket_and_a_damaged_tar_is_cached_anew(tmp_path, server):
    one, two, three = (far(tmp_path, machine, root="s3://bucket/caches/toy") for machine in ("one", "two", "three"))
    cache.run(one)
    found, store = values(two), s3fs.S3FileSystem()
    assert found == values(one) and len(found) == 32
    assert (distill.run(two) / "student.safetensors").exists()
    tar = next(name for name in store.ls("bucket/caches/toy", detail=False) if re.search(r"train-000-.*tar", name))
    damaged = bytearray(store.cat_file(tar))
    damaged[3000] ^= 1
    store.pipe_file(tar, bytes(damaged))
    with pytest.raises(UserError, match=rf"s3://{tar}: differs from its sidecar .*; delete it there"):
        values(three)
    store.rm(tar)
    cache.run(three)
    store.invalidate_cache()
    assert store.exists(tar) and values(three) == values(far(tmp_path, "four", root="s3://bucket/caches/toy")) == found


def test_a_server_that_does_not_answer_and_a_bucket_that_is_missing_are_one_line(tmp_path, server):
    recipe = far(tmp_path, "one", root="s3://bucket/caches/other")
    cache.run(recipe)
    folder = opened(recipe.cache).folder
    before = {path.name for path in folder.iterdir()}
    with pytest.raises(
        UserError, match=r"s3://nowhere/a/manifest\.json: FileNotFoundError: .*bucket does not exist.*; is the URL"
    ):
        cache.run(far(tmp_path, "one", root="s3://nowhere/a"))
    server.stop()
    with pytest.raises(UserError, match=r"s3://bucket/caches/other/: EndpointConnectionError.*; is the URL right"):
        cache.run(recipe)
    assert {path.name for path in folder.iterdir()} == before
