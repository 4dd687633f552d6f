// Classify pictures by transformers.js with an exported folder: node transformers_clip.mjs MODULES FOLDER ASKED OUT.
// Writes JSON {version, chosen, image, text}: the place of the label whose text is nearest, and the embeddings.
// MODULES is the node_modules folder that has @huggingface/transformers.
import { readFileSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { basename, dirname, join, resolve } from 'node:path';
import { pathToFileURL } from 'node:url';

const [modules, folder, given, out] = process.argv.slice(2);
const require = createRequire(join(resolve(modules), 'anchor.js'));
const { AutoProcessor, AutoTokenizer, CLIPTextModelWithProjection, CLIPVisionModelWithProjection, RawImage, cos_sim, env } =
  await import(pathToFileURL(require.resolve('@huggingface/transformers')));

env.allowRemoteModels = false;
env.localModelPath = dirname(resolve(folder));
const name = basename(resolve(folder));
const options = { dtype: JSON.parse(readFileSync(join(folder, 'fmdistill.json'))).precision };
const { pictures, labels, template, texts } = JSON.parse(readFileSync(given));

const tokenizer = await AutoTokenizer.from_pretrained(name);
const textModel = await CLIPTextModelWithProjection.from_pretrained(name, options);
const embed = async (given) => (await textModel(tokenizer(given, { padding: true, truncation: true }))).text_embeds.tolist();
const [text, classes] = [await embed(texts), await embed(labels.map((label) => template.replace('{}', label)))];
const processor = await AutoProcessor.from_pretrained(name);
const visionModel = await CLIPVisionModelWithProjection.from_pretrained(name, options);
const image = [];
for (const picture of pictures) {
  const { image_embeds } = await visionModel(await processor(await RawImage.read(picture)));
  image.push(...image_embeds.tolist());
}
const chosen = image.map((embedding) => {
  const similarity = classes.map((other) => cos_sim(embedding, other));
  return similarity.indexOf(Math.max(...similarity));
});
writeFileSync(out, JSON.stringify({ version: env.version, chosen, image, text }));
