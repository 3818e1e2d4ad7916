//! Which dropout on the adapters' matrices a run has, and what it makes of `lora_alpha`.

use super::config::TrainConfig;
use crate::ops::matrix_dropout::MatrixDropout;
use crate::store::{AdapterConfig, MatrixDropoutScale, MatrixDropoutSettings};
use crate::{Error, Result};

/// The dropout that the configuration asks for, or else that of the adapter which the run starts from; `None` for none.
pub(super) fn settings(
    config: &TrainConfig,
    start: Option<&MatrixDropoutSettings>,
) -> Option<MatrixDropoutSettings> {
    let p = config.lora_matrix_dropout.or(start.map(|start| start.p));
    let scale = config.lora_matrix_dropout_scale;
    let scale = scale.or(start.map(|start| start.scale));
    let settings = MatrixDropoutSettings {
        p: p.unwrap_or(0.0),
        scale: scale.unwrap_or(MatrixDropoutScale::Inverse),
        seed: config.seed,
    };
    (settings.p > 0.0).then_some(settings)
}

impl TrainConfig {
    /// The dropout on matrices that the adapter was trained with which the run starts from.
    ///
    /// # Errors
    /// Those of [`MatrixDropoutSettings::read`].
    pub(super) fn matrix_dropout_of_adapter(&self) -> Result<Option<MatrixDropoutSettings>> {
        let start = self.adapter.as_ref().map(MatrixDropoutSettings::read);
        Ok(start.transpose()?.flatten())
    }

    /// The dropout on matrices that a run of this configuration has.
    ///
    /// # Errors
    /// Those of [`MatrixDropoutSettings::read`].
    pub fn matrix_dropout(&self) -> Result<Option<MatrixDropoutSettings>> {
        Ok(settings(self, self.matrix_dropout_of_adapter()?.as_ref()))
    }
}

/// Gives the adapter the `lora_alpha` and `alpha_pattern` that it has outside of training. With [`MatrixDropoutScale::None`] what is asked for is
/// that of training, where the factors are not scaled; that of an adapter with such settings, which the run starts from, is
/// not.
pub(super) fn set_alpha(
    adapter: &mut AdapterConfig,
    settings: Option<&MatrixDropoutSettings>,
    start: Option<&MatrixDropoutSettings>,
) {
    let unscaled = |settings: Option<&MatrixDropoutSettings>| {
        let settings = settings.filter(|settings| settings.scale == MatrixDropoutScale::None);
        settings.map(|settings| MatrixDropout::kept_share(settings.p))
    };
    if let Some(share) = unscaled(settings) {
        let before = unscaled(start).unwrap_or(1.0);
        if share != before {
            let factor = share / before;
            adapter.lora_alpha *= factor;
            let patterns = std::mem::take(&mut adapter.alpha_pattern);
            adapter.alpha_pattern = patterns.map(|alpha| factor * alpha);
        }
    }
}

/// A resumed run goes on with the masks that it had.
///
/// # Errors
/// [`Error::Config`] naming the key and the checkpoint.
pub(super) fn expect_same(
    found: Option<&MatrixDropoutSettings>,
    configured: Option<&MatrixDropoutSettings>,
    checkpoint: &std::path::Path,
) -> Result<()> {
    let p = |settings: Option<&MatrixDropoutSettings>| settings.map_or(0.0, |settings| settings.p);
    let other = |key: &str, configured: &str, found: &str| {
        let dir = checkpoint.display();
        Err(Error::config(
            key,
            format!("is {configured}, but {found} in {dir}"),
        ))
    };
    if p(found) != p(configured) {
        let [configured, found] = [configured, found].map(|settings| p(settings).to_string());
        return other("lora_matrix_dropout", &configured, &found);
    }
    match (found, configured) {
        (Some(found), Some(configured)) if found.scale != configured.scale => {
            let [configured, found] =
                [configured, found].map(|settings| format!("{:?}", settings.scale).to_lowercase());
            other("lora_matrix_dropout_scale", &configured, &found)
        }
        _ => Ok(()),
    }
}
