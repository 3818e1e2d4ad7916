//! A digest that tells one base model from another without reading all of it.

use sha2::{Digest, Sha256};

use super::checkpoint::Checkpoint;
use super::manifest::hex;
use crate::{Error, Result};

/// Files up to this size are read whole.
const WHOLE_BYTES: usize = 64 << 20;
/// Of larger ones, so many bytes ...
const SAMPLE_BYTES: usize = 4 << 10;
/// ... at the start of each stretch of so many are.
const STRETCH_BYTES: usize = 1 << 20;

impl Checkpoint {
    /// A SHA-256, in hexadecimal, of `config.json` and of the weight files. Of a file beyond 64 MiB it takes the size, the
    /// header with every tensor's name and shape, 4 KiB of each MiB and the last 4 KiB: a model that was trained further or
    /// quantized otherwise has another digest, a single byte that changed may go unseen.
    ///
    /// # Errors
    /// [`Error::Io`] if `config.json` cannot be read again.
    pub fn fingerprint(&self) -> Result<String> {
        let config = std::fs::read(self.config_path()).map_err(Error::io(self.config_path()))?;
        let mut hash = Sha256::new();
        hash.update((config.len() as u64).to_le_bytes());
        hash.update(&config);
        for file in self.files() {
            let (header, all) = (file.header_bytes(), file.all_bytes());
            hash.update((all.len() as u64).to_le_bytes());
            if all.len() <= WHOLE_BYTES {
                hash.update(all);
                continue;
            }
            hash.update(&all[..header]);
            for stretch in all[header..].chunks(STRETCH_BYTES) {
                hash.update(&stretch[..SAMPLE_BYTES.min(stretch.len())]);
            }
            hash.update(&all[all.len() - SAMPLE_BYTES..]);
        }
        Ok(hex(&hash.finalize()))
    }
}
