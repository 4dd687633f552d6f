// Embed a picture and texts with an exported folder in transformers.js: node transformers_clip.mjs MODULES FOLDER PICTURE TEXT...
// Prints JSON: {version, ids, image, text}. MODULES is the node_modules folder that has @huggingface/transformers.
import { createRequire } from 'node:module';
import { basename, dirname, join, resolve } from 'node:path';
import { pathToFileURL } from 'node:url';

const [modules, folder, picture, ...texts] = process.argv.slice(2);
const require = createRequire(join(resolve(modules), 'anchor.js'));
const { AutoProcessor, AutoTokenizer, CLIPTextModelWithProjection, CLIPVisionModelWithProjection, RawImage, env } =
  await import(pathToFileURL(require.resolve('@huggingface/transformers')));

env.allowRemoteModels = false;
env.localModelPath = dirname(resolve(folder));
const name = basename(resolve(folder));
const options = { dtype: process.env.DTYPE ?? 'fp32' };

const tokenizer = await AutoTokenizer.from_pretrained(name);
const tokens = tokenizer(texts, { padding: 'max_length', truncation: true });
const textModel = await CLIPTextModelWithProjection.from_pretrained(name, options);
const { text_embeds } = await textModel(tokens);
const processor = await AutoProcessor.from_pretrained(name);
const visionModel = await CLIPVisionModelWithProjection.from_pretrained(name, options);
const { image_embeds } = await visionModel(await processor(await RawImage.read(picture)));
const ids = tokens.input_ids.tolist().map((row) => row.map(Number));
console.log(JSON.stringify({ version: env.version, ids, image: image_embeds.tolist(), text: text_embeds.tolist() }));
