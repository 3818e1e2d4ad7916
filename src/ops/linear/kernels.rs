//! The products of adapters with their input on a device, for all adapters that read the same input together:
//! `u_j = x'_j A_j^T`, `dA_j += du_j^T x'_j`, `dx += sum over j of keep_scale mask_j (du_j A_j)`.
//!
//! Where nothing is dropped they are products of matrices; with dropout the kernels of `cuda/lora.cu` mask the input in
//! registers, so that no mask and no masked input is ever whole.

use candle_core::{DType, Tensor};

use super::super::cpu::expect_dims;
use super::super::dropout::Mask;
use super::super::launcher::{Factor, Grid, Launcher, Operand};
use super::OP;
use crate::{Error, Result};

/// Ranks that a block of the kernels takes.
const RANKS: usize = 64;
/// Rows of a block of the kernel for `u`, and columns of `x` that it takes at a time.
const DOWN: (usize, usize) = (64, 128);
/// Columns of a block of the kernel for `dA`, and rows of `x` that it takes at a time.
const GRAD_A: (usize, usize) = (128, 32);
/// Rows and columns of a block of the kernel for `dx`.
const UP: (usize, usize) = (64, 128);

/// Adapters of layers that read the same input, as one.
#[derive(Debug, Clone, Copy)]
pub struct Stack<'a> {
    /// The A of each, one after another: `[J R, in]`.
    pub a: &'a Tensor,
    /// How many there are, J.
    pub adapters: usize,
    /// Dropout on the input of each, or on none: that of modules that follow one another.
    pub masks: &'a [Mask],
}

impl Stack<'_> {
    /// R and `in`.
    fn dims(&self) -> Result<(usize, usize)> {
        let (ranks, d_in) = self.a.dims2()?;
        let is_whole = self.adapters > 0
            && ranks.is_multiple_of(self.adapters)
            && [0, self.adapters].contains(&self.masks.len())
            && self.masks.windows(2).all(|pair| pair[1].follows(&pair[0]));
        match is_whole {
            true => Ok((ranks / self.adapters, d_in)),
            false => Err(Error::Shape {
                op: OP,
                expected: "adapters of one rank, with masks of modules in a row or none".into(),
                found: format!("{} with {ranks} ranks, {:?}", self.adapters, self.masks),
            }),
        }
    }

    /// # Shapes
    /// `x: [N, in]` -> `u_j: [N, R]` of each adapter, views of one tensor.
    pub fn down_project(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        let launcher = Launcher::on(OP, x.device())?;
        self.of_each(&self.down(&launcher, x)?)
    }

    /// Adds the gradients of the factors, of A to `d_a: [J R, in]`; gives `du: [N, J R]`.
    pub fn backward(&self, branches: &[Branch<'_>], x: &Tensor, d_a: &Tensor) -> Result<Tensor> {
        let launcher = Launcher::on(OP, x.device())?;
        let du = launcher.empty((x.dim(0)?, self.a.dim(0)?), DType::BF16)?;
        for (branch, du) in branches.iter().zip(self.of_each(&du)?) {
            branch.backward(&launcher, &du)?;
        }
        self.add_grad_a(&launcher, x, &du, d_a)?;
        Ok(du)
    }

    /// Adds the gradient of the input that comes through the adapters to `dx: [N, in]`.
    ///
    /// # Shapes
    /// `du: [N, J R]`.
    pub fn add_input_grad(&self, du: &Tensor, dx: &Tensor) -> Result<()> {
        self.add_up(&Launcher::on(OP, dx.device())?, du, dx)
    }

    /// The columns of each adapter in `[N, J R]`.
    fn of_each(&self, all: &Tensor) -> Result<Vec<Tensor>> {
        let (r, _) = self.dims()?;
        let columns = (0..self.adapters).map(|i| Ok(all.narrow(1, i * r, r)?));
        columns.collect()
    }

    /// `u: [N, J R]`.
    pub(super) fn down(&self, launcher: &Launcher, x: &Tensor) -> Result<Tensor> {
        const THREADS: u32 = 512;
        let ((n, d), (r, d_in)) = (x.dims2()?, self.dims()?);
        expect_dims(OP, "x", x, &[n, d_in])?;
        let u = launcher.empty((n, self.adapters * r), DType::BF16)?;
        let Some(first) = self.masks.first() else {
            let factors = (Factor::new(x), Factor::transposed(self.a));
            launcher.gemm(OP, factors, &u, 1.0, 0.0)?;
            return Ok(u);
        };
        let (blocks, splits) = down_grid(n, d, (self.adapters, r));
        let partial = partial(launcher, splits, u.elem_count())?;
        let mut operands = vec![Operand::Read(x), Operand::Read(self.a)];
        operands.extend([n, d, r, self.adapters].map(Operand::U32));
        operands.push(Operand::Write(&u));
        operands.push(partial.as_ref().map_or(Operand::Null, Operand::Write));
        operands.extend(mask_operands(first));
        let grid = Grid::blocks(blocks, splits).with_threads(THREADS);
        // SAFETY: the tensors have these sizes, and there is room for the parts of each split.
        unsafe { launcher.launch("lora_down_bf16", grid, &operands)? };
        sum_splits(launcher, "lora_down_sum_bf16", (splits, partial), &u)?;
        Ok(u)
    }

    /// `dA += du^T x'`.
    ///
    /// # Shapes
    /// `x: [N, in]`, `du: [N, J R]` in bf16, `d_a: [J R, in]` in f32.
    pub(super) fn add_grad_a(
        &self,
        launcher: &Launcher,
        x: &Tensor,
        du: &Tensor,
        d_a: &Tensor,
    ) -> Result<()> {
        let (n, (r, d)) = (x.dim(0)?, self.dims()?);
        expect_dims(OP, "x", x, &[n, d])?;
        expect_dims(OP, "du", du, &[n, self.adapters * r])?;
        expect_dims(OP, "d_lora_a", d_a, &[self.adapters * r, d])?;
        let Some(first) = self.masks.first() else {
            let factors = (Factor::transposed(du), Factor::new(x));
            return launcher.gemm(OP, factors, d_a, 1.0, 1.0);
        };
        let (blocks, splits) = grad_a_grid(n, d, (self.adapters, r));
        let partial = partial(launcher, splits, d_a.elem_count())?;
        let mut operands = vec![Operand::Read(x), Operand::Read(du)];
        operands.extend([n, d, r, self.adapters].map(Operand::U32));
        operands.push(Operand::Write(d_a));
        operands.push(partial.as_ref().map_or(Operand::Null, Operand::Write));
        operands.extend(mask_operands(first));
        let grid = Grid::blocks(blocks, splits);
        // SAFETY: as in `down`.
        unsafe { launcher.launch("lora_grad_a_bf16", grid, &operands)? };
        sum_splits(launcher, "lora_grad_a_sum_f32", (splits, partial), d_a)
    }

    /// `dx += sum over j of keep_scale mask_j (du_j A_j)`.
    ///
    /// # Shapes
    /// `du: [N, J R]`, `dx: [N, in]`.
    pub(super) fn add_up(&self, launcher: &Launcher, du: &Tensor, dx: &Tensor) -> Result<()> {
        let (n, (r, d)) = (dx.dim(0)?, self.dims()?);
        expect_dims(OP, "du", du, &[n, self.adapters * r])?;
        expect_dims(OP, "dx", dx, &[n, d])?;
        let Some(first) = self.masks.first() else {
            return launcher.gemm(OP, (Factor::new(du), Factor::new(self.a)), dx, 1.0, 1.0);
        };
        let mut operands = vec![Operand::Read(du), Operand::Read(self.a)];
        operands.extend([n, d, r, self.adapters].map(Operand::U32));
        operands.push(Operand::Write(dx));
        operands.extend(mask_operands(first));
        let grid = Grid::blocks(d.div_ceil(UP.1), n.div_ceil(UP.0));
        // SAFETY: the tensors have these sizes.
        unsafe { launcher.launch("lora_up_bf16", grid, &operands) }
    }
}

/// The last arguments of the kernels.
pub(super) fn mask_operands(mask: &Mask) -> [Operand<'static>; 6] {
    let words = [mask.key, mask.stream].concat();
    let [k0, k1, s0, s1] = std::array::from_fn(|i| Operand::U32(words[i] as usize));
    let threshold = Operand::U32(mask.threshold as usize);
    [k0, k1, s0, s1, threshold, Operand::F32(mask.keep_scale())]
}

/// A layer of a stack in backward.
#[derive(Debug, Clone, Copy)]
pub struct Branch<'a> {
    /// `[N, out]`.
    pub dy: &'a Tensor,
    /// `[N, R]`.
    pub u: &'a Tensor,
    /// `[out, R]`.
    pub b: &'a Tensor,
    pub scaling: f32,
    /// Where the gradient of B is added, `[out, R]`.
    pub d_b: &'a Tensor,
}

impl Branch<'_> {
    /// `du = scaling dy B`, and `dB += scaling dy^T u`.
    pub(super) fn backward(&self, launcher: &Launcher, du: &Tensor) -> Result<()> {
        let (dy, by_row) = (Factor::new(self.dy), Factor::transposed(self.dy));
        launcher.gemm(OP, (dy, Factor::new(self.b)), du, self.scaling, 0.0)?;
        launcher.gemm(
            OP,
            (by_row, Factor::new(self.u)),
            self.d_b,
            self.scaling,
            1.0,
        )
    }
}

/// Blocks of the kernel for the `u` of so many adapters of rank `r`, and in how many parts its sums are taken.
fn down_grid(n: usize, d: usize, (adapters, r): (usize, usize)) -> (usize, usize) {
    let blocks = n.div_ceil(DOWN.0) * adapters * r.div_ceil(RANKS);
    (blocks, splits(blocks, d.div_ceil(DOWN.1)))
}

/// The same of the kernel for their `dA`.
fn grad_a_grid(n: usize, d: usize, (adapters, r): (usize, usize)) -> (usize, usize) {
    let blocks = d.div_ceil(GRAD_A.0) * adapters * r.div_ceil(RANKS);
    (blocks, splits(blocks, n.div_ceil(GRAD_A.1)))
}

/// In how many parts a sum along `steps` is taken where `blocks` blocks would leave processors idle.
pub(super) fn splits(blocks: usize, steps: usize) -> usize {
    /// Blocks that fill a large GPU: a constant, so that no result depends on the one at hand.
    const BLOCKS: usize = 128;
    (BLOCKS / blocks.max(1)).clamp(1, steps.max(1))
}

/// Room for the parts of a result of `count` elements.
fn partial(launcher: &Launcher, splits: usize, count: usize) -> Result<Option<Tensor>> {
    (splits > 1)
        .then(|| launcher.empty(splits * count, DType::F32))
        .transpose()
}

/// Bytes that kernels take besides their results for adapters with dropout on one input: in forward, and in backward.
pub fn dropout_scratch_bytes(n: usize, d: usize, (adapters, r): (usize, usize)) -> [u64; 2] {
    let bytes = |splits: usize, count: usize| match splits {
        1 => 0,
        _ => (4 * splits * count) as u64,
    };
    [
        bytes(down_grid(n, d, (adapters, r)).1, n * adapters * r),
        bytes(grad_a_grid(n, d, (adapters, r)).1, adapters * r * d),
    ]
}

/// Adds up the parts.
fn sum_splits(
    launcher: &Launcher,
    kernel: &str,
    (splits, partial): (usize, Option<Tensor>),
    result: &Tensor,
) -> Result<()> {
    let Some(partial) = partial else {
        return Ok(());
    };
    let count = result.elem_count();
    let operands = [
        Operand::Read(&partial),
        Operand::U32(splits),
        Operand::U64(count),
        Operand::Write(result),
    ];
    // SAFETY: `partial` has `count` elements for each part.
    unsafe { launcher.launch(kernel, launcher.grid_stride(count, 1), &operands) }
}
