#!/bin/sh
# Download onnxruntime-web of the version that the web page is tested with, for `fmdistill export RUN web runtime=PATH`
# and tests/test_export_web_page.py. Needs npm. Usage: sh benchmarks/clients/onnxruntime_web.sh [FOLDER]
set -eu
version=$(sed -n 's/^RUNTIME_VERSION = "\(.*\)".*/\1/p' "$(dirname "$0")/../../fmdistill/export/web.py")
folder=${1:-build/onnxruntime-web}
mkdir -p "$folder"
npm pack --silent "onnxruntime-web@$version" --pack-destination "$folder" > /dev/null
tar xzf "$folder/onnxruntime-web-$version.tgz" -C "$folder"
echo "$folder/package"
