//! What a model is used for once it is trained: scoring text that is given ([`evaluate`]), answering
//! multiple-choice questions ([`multiple_choice`]) and writing text ([`generate`]).

mod agreement;
mod ensemble;
mod evaluate;
mod generate;
mod multiple_choice;
mod sampling;

pub use agreement::{Agreement, agreement};
pub use ensemble::{Ensemble, evaluate_ensemble};
pub use evaluate::{ECE_BINS, EVALUATION_TOKENS, Evaluation, LogProbs, evaluate, evaluate_within};
pub use generate::{Finish, GenerateOptions, Generated, Session, generate};
pub use multiple_choice::{
    Answer, LetterIds, MultipleChoice, multiple_choice, multiple_choice_ensemble,
};
pub use sampling::{Sampler, SamplingOptions};

pub(crate) use evaluate::sequences;
