//! Damages files in the ways that break parsers, from a seed.

use qlora::data::SplitMix64;

/// What parsers stumble over, put in anywhere.
const PIECES: [&[u8]; 22] = [
    b"null",
    b"true",
    b"[]",
    b"{}",
    b"\"\"",
    b"-1",
    b"0",
    b"1e999",
    b"-0.0",
    b"18446744073709551615",
    b"9223372036854775808",
    b"4294967296",
    b"\"../../etc/passwd\"",
    b"\"/dev/zero\"",
    b"\\ud800",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\0",
    b"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
    b"{\"a\":{\"a\":{\"a\":{\"a\":{\"a\":",
    b"{%",
    b"}}",
];

/// Lengths and offsets at the edges of their types.
const NUMBERS: [u64; 10] = [
    0,
    1,
    7,
    u32::MAX as u64,
    1 << 32,
    1 << 40,
    i64::MAX as u64,
    1 << 63,
    u64::MAX - 7,
    u64::MAX,
];

pub struct Mutator {
    random: SplitMix64,
}

impl Mutator {
    pub fn new(seed: u64) -> Self {
        Self {
            random: SplitMix64::new(seed),
        }
    }

    fn below(&mut self, bound: usize) -> usize {
        self.random.below(bound.max(1) as u64) as usize
    }

    /// One of `corpus` with one to eight wounds.
    pub fn next(&mut self, corpus: &[Vec<u8>]) -> Vec<u8> {
        let chosen = self.below(corpus.len());
        let mut bytes = corpus[chosen].clone();
        for _ in 0..1 + self.below(8) {
            self.wound(&mut bytes, corpus);
        }
        bytes
    }

    fn wound(&mut self, bytes: &mut Vec<u8>, corpus: &[Vec<u8>]) {
        let at = self.below(bytes.len() + 1);
        let length = 1 + self.below(16.min(bytes.len() - at + 1));
        let end = (at + length).min(bytes.len());
        match self.below(11) {
            0 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
            1 if at < bytes.len() => bytes[at] = self.below(256) as u8,
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at..end)),
            4 => {
                let piece = bytes[at..end].to_vec();
                let repeats = 1 + self.below(8);
                let pieces = piece.repeat(repeats);
                bytes.splice(at..at, pieces);
            }
            5 => {
                let piece = PIECES[self.below(PIECES.len())];
                bytes.splice(at..at, piece.iter().copied());
            }
            6 => {
                let piece = PIECES[self.below(PIECES.len())];
                bytes.splice(at..end, piece.iter().copied());
            }
            7 => self.replace_digits(bytes, at),
            8 => {
                // At the start as often as anywhere else: that is where headers have their length.
                let at = if self.below(2) == 0 { 0 } else { at };
                let number = NUMBERS[self.below(NUMBERS.len())].to_le_bytes();
                let end = (at + number.len()).min(bytes.len());
                bytes.splice(at..end, number);
            }
            9 => {
                let other = &corpus[self.below(corpus.len())];
                let from = self.below(other.len() + 1);
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
            _ => {
                let other = self.below(bytes.len() + 1);
                let end = (other + length).min(bytes.len());
                let piece = bytes[other.min(end)..end].to_vec();
                bytes.splice(at..at, piece);
            }
        }
    }

    /// Puts another number in the place of the digits after `at`.
    fn replace_digits(&mut self, bytes: &mut Vec<u8>, at: usize) {
        let is_digit = |byte: &u8| byte.is_ascii_digit();
        let Some(start) = bytes[at..].iter().position(is_digit).map(|p| at + p) else {
            return;
        };
        let digits = bytes[start..].iter().take_while(|byte| is_digit(byte));
        let end = start + digits.count();
        let number = match self.below(3) {
            0 => NUMBERS[self.below(NUMBERS.len())].to_string(),
            1 => self.below(300).to_string(),
            _ => format!("-{}", self.below(300)),
        };
        bytes.splice(start..end, number.into_bytes());
    }
}
