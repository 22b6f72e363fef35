"""The paper's language-generation experiments: text in, sparse Transformers out."""
