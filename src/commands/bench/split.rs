//! Where the time of a step goes: by the spans of its operations on the CPU, by what they queue on a device.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use qlora::device::{self, COPIES, PRODUCTS, Placement, Profiler};
use qlora::train::Trainer;
use tracing::{Subscriber, span};
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{Layer, Registry};

/// Seconds of a step by what they were spent on, the most first.
pub type Split = Vec<(String, f64)>;

/// Does a step and tells where its time went.
///
/// On a device everything is timed by itself, so that nothing overlaps: it is shares that the result tells.
pub fn of_step(trainer: &mut Trainer, placement: &Placement) -> anyhow::Result<Split> {
    let seconds = match device::runtime(&placement.device).filter(|_| placement.uses_kernels()) {
        Some(runtime) => {
            let profiler = Arc::new(Profiler::new(Arc::clone(&runtime)));
            device::replace(&placement.device, Arc::clone(&profiler) as _);
            let step = trainer.step();
            device::replace(&placement.device, runtime);
            step?;
            let mut seconds = BTreeMap::new();
            for (kind, spent) in &profiler.seconds() {
                *seconds.entry(part_of_kernel(kind).to_string()).or_default() += spent;
            }
            seconds
        }
        None => {
            let started = Instant::now();
            let spent = Spent::default();
            let subscriber = Registry::default().with(spent.clone());
            tracing::subscriber::with_default(subscriber, || trainer.step())?;
            let mut seconds = BTreeMap::<String, f64>::new();
            for (span, spent) in spent.lock().iter() {
                let part = part_of_span(span).to_string();
                *seconds.entry(part).or_default() += spent.as_secs_f64();
            }
            let known: f64 = seconds.values().sum();
            seconds.insert("other".into(), started.elapsed().as_secs_f64() - known);
            seconds
        }
    };
    let mut split: Split = seconds.into_iter().collect();
    split.sort_by(|a, b| b.1.total_cmp(&a.1));
    Ok(split)
}

/// What a kernel belongs to, by the first word of its name.
fn part_of_kernel(kind: &str) -> &str {
    match kind {
        PRODUCTS | COPIES | "attention" => kind,
        "nf4" => "dequantization",
        "linear" => "loss",
        "adamw" => "optimizer",
        "lora" | "dropout" => "adapters",
        _ => "elementwise",
    }
}

/// What an operation belongs to, by its span.
fn part_of_span(span: &str) -> &str {
    match span {
        // On the CPU weights are dequantized tile by tile within their products.
        "linear" => "products with dequantization",
        other => other,
    }
}

/// The time within each kind of span and in none below it.
#[derive(Debug, Default, Clone)]
struct Spent(Arc<Mutex<BTreeMap<&'static str, Duration>>>);

impl Spent {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<&'static str, Duration>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// When a span was entered, and how long spans within it took.
struct Entered {
    at: Instant,
    within: Duration,
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Spent {
    fn on_enter(&self, id: &span::Id, context: Context<'_, S>) {
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(Entered {
                at: Instant::now(),
                within: Duration::ZERO,
            });
        }
    }

    fn on_exit(&self, id: &span::Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let Some(entered) = span.extensions_mut().remove::<Entered>() else {
            return;
        };
        let all = entered.at.elapsed();
        *self.lock().entry(span.name()).or_default() += all - entered.within;
        if let Some(around) = span.parent()
            && let Some(around) = around.extensions_mut().get_mut::<Entered>()
        {
            around.within += all;
        }
    }
}
