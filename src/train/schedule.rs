//! Learning-rate schedules, step for step those of transformers (`optimization.py`, `get_*_schedule`).

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use super::config::TrainConfig;

/// The shape of the learning rate over a run, by its name in transformers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SchedulerType {
    /// The peak from the first step on: it has no warm-up, whatever is set.
    Constant,
    ConstantWithWarmup,
    /// Down to 0 after the last step.
    Linear,
    /// Half a cosine down to 0.
    Cosine,
    /// Half a cosine down to a share of the peak.
    CosineWithMinLr,
    /// `1 / sqrt(step)`, in units of the warm-up.
    InverseSqrt,
}

/// The learning rate of every step of a run.
///
/// After the warm-up, during which the rate of step `k` is `peak * k / warmup_steps`, the shape decides.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    pub kind: SchedulerType,
    pub peak: f64,
    pub warmup_steps: usize,
    /// Optimizer steps of the whole run.
    pub total_steps: usize,
    /// Lowest rate of [`SchedulerType::CosineWithMinLr`], as a share of the peak.
    pub min_lr_rate: f64,
}

/// `inverse_sqrt` without a warm-up decays in units of so many steps, as transformers has it.
const INVERSE_SQRT_DEFAULT_TIMESCALE: usize = 10_000;

impl Schedule {
    /// The schedule of a run of `total_steps` optimizer steps.
    pub fn from_config(config: &TrainConfig, total_steps: usize) -> Self {
        // As in transformers, a number of steps wins over a ratio, and a ratio is rounded up.
        let warmup_steps = match config.warmup_steps {
            0 => (total_steps as f64 * config.warmup_ratio).ceil() as usize,
            steps => steps,
        };
        Self {
            kind: config.lr_scheduler_type,
            peak: config.learning_rate,
            warmup_steps,
            total_steps,
            min_lr_rate: config.min_lr_rate.unwrap_or(0.0),
        }
    }

    /// The learning rate of optimizer step `step`, counted from 0.
    pub fn learning_rate(&self, step: usize) -> f64 {
        self.peak * self.factor(step)
    }

    fn factor(&self, step: usize) -> f64 {
        if self.kind == SchedulerType::Constant {
            return 1.0;
        }
        let warmup = self.warmup_steps;
        if step < warmup {
            return step as f64 / warmup as f64;
        }
        let decay_steps = self.total_steps.saturating_sub(warmup).max(1) as f64;
        let progress = (step - warmup) as f64 / decay_steps;
        let half_cosine = 0.5 * (1.0 + (PI * progress).cos());
        match self.kind {
            SchedulerType::Constant | SchedulerType::ConstantWithWarmup => 1.0,
            SchedulerType::Linear => {
                (self.total_steps.saturating_sub(step) as f64 / decay_steps).max(0.0)
            }
            SchedulerType::Cosine => half_cosine.max(0.0),
            SchedulerType::CosineWithMinLr => {
                (half_cosine * (1.0 - self.min_lr_rate) + self.min_lr_rate).max(0.0)
            }
            SchedulerType::InverseSqrt => {
                let timescale = match warmup {
                    0 => INVERSE_SQRT_DEFAULT_TIMESCALE,
                    steps => steps,
                } as f64;
                let shift = timescale - warmup as f64;
                1.0 / ((step as f64 + shift) / timescale).sqrt()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct Case {
        lr_scheduler_type: SchedulerType,
        learning_rate: f64,
        warmup_steps: usize,
        warmup_ratio: f64,
        total_steps: usize,
        min_lr_rate: Option<f64>,
        learning_rates: Vec<f64>,
    }

    #[test]
    fn every_step_has_the_learning_rate_of_transformers() {
        let fixture = include_str!("../../tests/fixtures/schedules.json");
        let fixture: serde_json::Value = serde_json::from_str(fixture).unwrap();
        let cases: Vec<Case> = serde_json::from_value(fixture["cases"].clone()).unwrap();
        assert!(cases.len() >= 12);
        for case in cases {
            let config = TrainConfig {
                lr_scheduler_type: case.lr_scheduler_type,
                learning_rate: case.learning_rate,
                warmup_steps: case.warmup_steps,
                warmup_ratio: case.warmup_ratio,
                min_lr_rate: case.min_lr_rate,
                ..TrainConfig::default()
            };
            let schedule = Schedule::from_config(&config, case.total_steps);
            for (step, expected) in case.learning_rates.iter().enumerate() {
                let found = schedule.learning_rate(step);
                assert!(
                    (found - expected).abs() <= 1e-14 * case.learning_rate,
                    "{schedule:?}, step {step}: expected {expected}, found {found}"
                );
            }
        }
    }
}
