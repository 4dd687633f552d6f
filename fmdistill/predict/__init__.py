"""Open what fmdistill trained or exported, and predict with it: masks from prompts, embeddings, and classes."""
