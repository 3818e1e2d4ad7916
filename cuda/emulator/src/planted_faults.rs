//! Defects that are planted into copies of the kernels, to see that the tests would notice them.
//!
//! A copy's kernels are in the table under their names with `@` and the fault's name behind.

/// A place in a kernel file where something is left out.
#[derive(Debug, Clone, Copy)]
pub struct PlantedFault {
    pub name: &'static str,
    /// The stem of the kernel file.
    pub file: &'static str,
    /// Text that has to be in the file exactly once, and what takes its place.
    pub replaces: &'static str,
    pub with: &'static str,
}

pub const FAULTS: &[PlantedFault] = &[];

impl PlantedFault {
    /// The source with the fault in it.
    pub fn plant(&self, source: &str) -> String {
        let places = source.matches(self.replaces).count();
        assert_eq!(
            places, 1,
            "{}.cu has {places} places for the fault `{}`, not one",
            self.file, self.name
        );
        source.replace(self.replaces, self.with)
    }
}
