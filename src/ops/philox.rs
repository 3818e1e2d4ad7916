//! Philox 4x32-10: random numbers as a function of a key and a counter, so that nothing has to be stored or replayed.
//!
//! Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; test vectors of Random123.

pub(super) const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// The key that the random numbers of one micro-batch have, for one of their purposes.
///
/// Made by Philox itself, so that positions of any size have room.
pub(super) fn micro_batch_key(
    seed: u64,
    step: usize,
    micro_batch: usize,
    purpose: u32,
) -> [u32; 2] {
    let seed = [seed as u32, (seed >> 32) as u32];
    let [low, high, ..] = philox(seed, [step as u32, micro_batch as u32, purpose, 0]);
    [low, high]
}

/// The key of each round.
pub(super) fn round_keys(key: [u32; 2]) -> [[u32; 2]; ROUNDS] {
    std::array::from_fn(|round| {
        [0, 1].map(|i| key[i].wrapping_add(WEYL[i].wrapping_mul(round as u32)))
    })
}

/// Four random words for `counter` under `key`.
pub fn philox(key: [u32; 2], counter: [u32; 4]) -> [u32; 4] {
    let mut c = counter;
    for key in round_keys(key) {
        let product = |i: usize, word: u32| u64::from(MULTIPLIERS[i]) * u64::from(word);
        let (p0, p1) = (product(0, c[0]), product(1, c[2]));
        c = [
            (p1 >> 32) as u32 ^ c[1] ^ key[0],
            p1 as u32,
            (p0 >> 32) as u32 ^ c[3] ^ key[1],
            p0 as u32,
        ];
    }
    c
}

/// The same for `N` counters side by side: word `w` of lane `l` is the low half of `[w][l]`.
///
/// Within a 64-bit lane the multiplication is one vector instruction, and what it leaves in the high half does no harm.
#[inline(always)]
pub(super) fn philox_lanes<const N: usize>(key: [u32; 2], counter: [[u64; N]; 4]) -> [[u64; N]; 4] {
    let mut c = counter;
    for key in round_keys(key) {
        let mut next = [[0; N]; 4];
        for lane in 0..N {
            let product =
                |i: usize, word: u64| u64::from(MULTIPLIERS[i]) * (word & u64::from(u32::MAX));
            let (p0, p1) = (product(0, c[0][lane]), product(1, c[2][lane]));
            next[0][lane] = (p1 >> 32) ^ c[1][lane] ^ u64::from(key[0]);
            next[1][lane] = p1;
            next[2][lane] = (p0 >> 32) ^ c[3][lane] ^ u64::from(key[1]);
            next[3][lane] = p0;
        }
        c = next;
    }
    c
}

/// An endless stream of uniform numbers, given by a seed and the stream's two numbers.
#[derive(Debug, Clone)]
pub struct Uniform {
    key: [u32; 2],
    stream: [u32; 2],
    next: u64,
    /// Of the call that the last number came from.
    words: [u32; 4],
}

impl Uniform {
    pub fn new(seed: u64, stream: [u32; 2]) -> Self {
        Self {
            key: [seed as u32, (seed >> 32) as u32],
            stream,
            next: 0,
            words: [0; 4],
        }
    }

    /// Uniform in [0, 1), with 24 random bits.
    pub fn next_f32(&mut self) -> f32 {
        let (block, lane) = (self.next / 4, self.next % 4);
        self.next += 1;
        if lane == 0 {
            let [first, second] = self.stream;
            let counter = [block as u32, (block >> 32) as u32, first, second];
            self.words = philox(self.key, counter);
        }
        (self.words[lane as usize] >> 8) as f32 / (1 << 24) as f32
    }
}

/// An endless stream of normally distributed numbers with mean 0 and deviation 1.
///
/// Pairs of uniform numbers, as Box and Muller turn them.
#[derive(Debug, Clone)]
pub struct Normal {
    uniform: Uniform,
    second: Option<f32>,
}

impl Normal {
    pub fn new(seed: u64, stream: [u32; 2]) -> Self {
        Self {
            uniform: Uniform::new(seed, stream),
            second: None,
        }
    }

    pub fn next_f32(&mut self) -> f32 {
        if let Some(second) = self.second.take() {
            return second;
        }
        // From (0, 1]: the logarithm of 0 would be infinite.
        let u = 1.0 - f64::from(self.uniform.next_f32());
        let angle = std::f64::consts::TAU * f64::from(self.uniform.next_f32());
        let radius = (-2.0 * u.ln()).sqrt();
        self.second = Some((radius * angle.sin()) as f32);
        (radius * angle.cos()) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_numbers_have_the_moments_of_the_normal_distribution() {
        let mut normal = Normal::new(3, [1, 2]);
        let n = 200_000;
        let values: Vec<f64> = (0..n).map(|_| f64::from(normal.next_f32())).collect();
        // Mean, variance and fourth moment with their standard errors, five of which are allowed.
        for (power, expected, variance) in [(1, 0.0, 1.0), (2, 1.0, 2.0), (4, 3.0, 96.0)] {
            let moment = values.iter().map(|v| v.powi(power)).sum::<f64>() / f64::from(n);
            let error = (variance / f64::from(n)).sqrt();
            assert!((moment - expected).abs() < 5.0 * error, "{power}: {moment}");
        }
    }

    #[test]
    fn philox_gives_the_published_vectors() {
        assert_eq!(
            philox([0, 0], [0; 4]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox([u32::MAX; 2], [u32::MAX; 4]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox(
                [0xa409_3822, 0x299f_31d0],
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344]
            ),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }
}
