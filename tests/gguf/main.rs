//! Models and adapters as GGUF, read back by candle's reader: names, shapes, values in their order, metadata, vocabulary,
//! and what is refused; and read again as models and adapters.

mod adapter;
mod files;
mod model;
mod reader;
mod sentencepiece;
mod vocabulary;
