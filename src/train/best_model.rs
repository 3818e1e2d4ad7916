//! The best checkpoint of a run, by an evaluation metric (`metric_for_best_model`).

use serde::{Deserialize, Serialize};

use super::config::{EvalMetric, TrainConfig};
use super::metrics::EvalRecord;

/// The best evaluation that a checkpoint was saved at; key names as in transformers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BestModel {
    pub best_metric: f64,
    /// Which one that is; unset: unknown, in checkpoints of earlier versions.
    #[serde(default)]
    pub metric_for_best_model: Option<EvalMetric>,
    pub best_global_step: usize,
    /// The name of its directory within the run directory.
    pub best_model_checkpoint: String,
}

/// How evaluations are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BestModelRule {
    metric: EvalMetric,
    greater_is_better: bool,
}

impl BestModelRule {
    /// `None` where the configuration asks for no best model.
    pub fn from_config(config: &TrainConfig) -> Option<Self> {
        let metric = match (config.metric_for_best_model, config.load_best_model_at_end) {
            (Some(metric), _) => metric,
            (None, true) => EvalMetric::EvalLoss,
            (None, false) => return None,
        };
        let greater_is_better = config
            .greater_is_better
            .unwrap_or(metric == EvalMetric::EvalTokenAccuracy);
        Some(Self {
            metric,
            greater_is_better,
        })
    }

    /// Whether it was found by the same metric.
    pub fn is_of(self, best: &BestModel) -> bool {
        best.metric_for_best_model
            .is_none_or(|metric| metric == self.metric)
    }

    /// The best model if a checkpoint named `checkpoint` is saved with this evaluation; of equal ones the first stays.
    pub fn better(
        self,
        best: Option<&BestModel>,
        record: &EvalRecord,
        checkpoint: &str,
    ) -> Option<BestModel> {
        let value = match self.metric {
            EvalMetric::EvalLoss => record.eval_loss,
            EvalMetric::EvalPerplexity => record.eval_perplexity,
            EvalMetric::EvalTokenAccuracy => record.eval_token_accuracy,
        };
        let is_better = best.is_none_or(|best| match self.greater_is_better {
            true => value > best.best_metric,
            false => value < best.best_metric,
        });
        (is_better && value.is_finite()).then(|| BestModel {
            best_metric: value,
            metric_for_best_model: Some(self.metric),
            best_global_step: record.step,
            best_model_checkpoint: checkpoint.to_string(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn better(config: TrainConfig, values: [f64; 2]) -> bool {
        let record = |value: f64| EvalRecord {
            step: 1,
            eval_loss: value,
            eval_perplexity: -value,
            eval_token_accuracy: value,
        };
        let rule = BestModelRule::from_config(&config).unwrap();
        let first = rule.better(None, &record(values[0]), "a").unwrap();
        rule.better(Some(&first), &record(values[1]), "b").is_some()
    }

    #[test]
    fn numbers_of_another_metric_are_not_compared() {
        let by = |metric| {
            let config = TrainConfig {
                metric_for_best_model: Some(metric),
                ..TrainConfig::default()
            };
            BestModelRule::from_config(&config).unwrap()
        };
        let record = EvalRecord {
            step: 1,
            eval_loss: 1.0,
            eval_perplexity: 2.0,
            eval_token_accuracy: 0.5,
        };
        let best = by(EvalMetric::EvalLoss).better(None, &record, "a").unwrap();
        assert!(by(EvalMetric::EvalLoss).is_of(&best));
        assert!(!by(EvalMetric::EvalTokenAccuracy).is_of(&best));
        let of_earlier_version = BestModel {
            metric_for_best_model: None,
            ..best
        };
        assert!(by(EvalMetric::EvalPerplexity).is_of(&of_earlier_version));
    }

    #[test]
    fn losses_want_to_be_low_and_accuracies_high_unless_told_otherwise() {
        let by = |metric_for_best_model, greater_is_better| TrainConfig {
            metric_for_best_model,
            greater_is_better,
            load_best_model_at_end: true,
            ..TrainConfig::default()
        };
        assert!(better(by(None, None), [2.0, 1.0]));
        assert!(!better(by(None, None), [1.0, 1.0]));
        assert!(!better(by(None, None), [1.0, f64::NAN]));
        let perplexity = Some(EvalMetric::EvalPerplexity);
        assert!(better(by(perplexity, None), [1.0, 2.0]));
        let accuracy = Some(EvalMetric::EvalTokenAccuracy);
        assert!(better(by(accuracy, None), [1.0, 2.0]));
        assert!(!better(by(accuracy, Some(false)), [1.0, 2.0]));
        assert!(BestModelRule::from_config(&TrainConfig::default()).is_none());
    }
}
