//! Models and adapters as GGUF, read back by candle's reader: names, shapes, values in their order, metadata, vocabulary,
//! and what is refused.

mod adapter;
mod files;
mod model;
mod sentencepiece;
mod vocabulary;
