// Runs the two networks beside the page: `load` once, `encode` once for each picture, `decode` for each prompt.
import { choose, maskOf, normalised, promptTensors, resize, resizedSize } from "./sam.js";

let model, ort, encoder, decoder, picture; // `picture`: {embedding, resized}

const tasks = {
  async load(settings) {
    model = settings;
    postMessage({ stage: "runtime" });
    const folder = new URL(model.page.runtime, location.href).href;
    ort = await import(folder + model.page.module);
    ort.env.wasm.wasmPaths = folder;
    const files = [await download(model.encoder), await download(model.decoder)];
    postMessage({ stage: "start" });
    [encoder, decoder] = [await session(files[0]), await session(files[1])];
    return { threads: ort.env.wasm.numThreads || 1 };
  },

  async encode({ bitmap }) {
    const start = performance.now(), { width, height } = bitmap, side = model.image_size;
    const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
    context.fillStyle = "#fff"; // below transparent pixels, as in training
    context.fillRect(0, 0, width, height);
    context.drawImage(bitmap, 0, 0);
    bitmap.close();
    const resized = resizedSize(height, width, side);
    const pixels = resize(context.getImageData(0, 0, width, height).data, height, width, ...resized);
    const { mean, std } = model.page;
    const input = new ort.Tensor("float32", normalised(pixels, ...resized, side, mean, std), [1, 3, side, side]);
    const outputs = await encoder.run({ [encoder.inputNames[0]]: input });
    picture = { embedding: outputs[encoder.outputNames[0]], resized };
    return { milliseconds: performance.now() - start };
  },

  async decode({ prompt, size }) {
    const start = performance.now(), { coords, labels } = promptTensors(prompt, picture.resized), low = 4 * model.grid;
    const outputs = await decoder.run({
      image_embeddings: picture.embedding,
      point_coords: new ort.Tensor("float32", coords, [1, labels.length, 2]),
      point_labels: new ort.Tensor("float32", labels, [1, labels.length]),
      mask_input: new ort.Tensor("float32", new Float32Array(low * low), [1, 1, low, low]),
      has_mask_input: new ort.Tensor("float32", [0], [1]),
      orig_im_size: new ort.Tensor("float32", [1, 1], [2]), // the page enlarges one mask itself, the network would four
    });
    const predicted = Array.from(outputs.iou_predictions.data), number = choose(predicted, prompt);
    const logits = outputs.low_res_masks.data.subarray(number * low * low, (number + 1) * low * low);
    const bits = maskOf(logits, low, model.image_size, picture.resized, size);
    return { bits, number, predicted: predicted[number], milliseconds: performance.now() - start };
  },
};

const session = (bytes) => ort.InferenceSession.create(bytes, { executionProviders: ["wasm"], graphOptimizationLevel: "all" });

async function download(name) {
  const response = await fetch(new URL(name, location.href));
  if (!response.ok) throw new Error(`${name}: the server answered ${response.status}`);
  const total = model.page.bytes[name], reader = response.body.getReader(), bytes = new Uint8Array(total);
  for (let done = 0; ;) {
    const { value, done: ended } = await reader.read();
    if (ended && done === total) return bytes;
    if (ended || done + value.length > total) throw new Error(`${name}: is not the file that was exported`);
    bytes.set(value, done);
    done += value.length;
    postMessage({ stage: "model", name, share: done / total });
  }
}

let queue = Promise.resolve(); // one after the other: ONNX Runtime's sessions do not overlap
onmessage = ({ data: { id, task, argument } }) => {
  queue = queue.then(async () => {
    try {
      const result = await tasks[task](argument);
      postMessage({ id, result }, result.bits ? [result.bits.buffer] : []);
    } catch (error) {
      postMessage({ id, problem: error.message || String(error) });
    }
  });
};
