// Segment by transformers.js with an exported folder: node transformers_sam.mjs MODULES FOLDER PROMPTS OUT.
// Writes JSON {version, masks: [{height, width, runs}]}: runs are lengths of 0s and 1s in turn, of the mask whose
// predicted IoU is highest. MODULES is the node_modules folder that has @huggingface/transformers.
import { readFileSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { basename, dirname, join, resolve } from 'node:path';
import { pathToFileURL } from 'node:url';

const [modules, folder, prompts, out] = process.argv.slice(2);
const require = createRequire(join(resolve(modules), 'anchor.js'));
const { AutoProcessor, RawImage, SamModel, env } = await import(
  pathToFileURL(require.resolve('@huggingface/transformers'))
);

env.allowRemoteModels = false;
env.localModelPath = dirname(resolve(folder));
const name = basename(resolve(folder));
const model = await SamModel.from_pretrained(name);
const processor = await AutoProcessor.from_pretrained(name);

const masks = [];
for (const prompt of JSON.parse(readFileSync(prompts))) {
  const image = await RawImage.read(prompt.picture);
  const inputs = await processor(image, { input_points: [[prompt.points]], input_labels: [[prompt.labels]] });
  const { pred_masks, iou_scores } = await model(inputs);
  const [upscaled] = await processor.post_process_masks(
    pred_masks, inputs.original_sizes, inputs.reshaped_input_sizes,
  );
  const scores = Array.from(iou_scores.data);
  const best = scores.indexOf(Math.max(...scores));
  const [height, width] = upscaled.dims.slice(-2);
  const mask = upscaled.data.slice(best * height * width, (best + 1) * height * width);
  const runs = [];
  for (let value = 0, start = 0, end = 0; end <= mask.length; end++) {
    if (end === mask.length || mask[end] !== value) {
      runs.push(end - start);
      [value, start] = [1 - value, end];
    }
  }
  masks.push({ height, width, runs });
}
writeFileSync(out, JSON.stringify({ version: env.version, masks }));
