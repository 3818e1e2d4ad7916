//! The emulator itself, on small kernels of its own (`tests/kernels/*.cu`): what it does as a GPU would, and what it reports.

mod copies;
mod faults;
mod instructions;
mod launches;
mod races;
