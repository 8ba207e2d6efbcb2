//! Parses the table of floors.
//!
//! It is the Markdown table in the crate's documentation whose first header is `floor`:
//!
//! ```text
//! //! | floor | modules | rule |
//! //! |---|---|---|
//! //! | 1 | `error`, [`rights`](crate::rights) | no dependencies |
//! //! | 2 | `sys` | all system calls |
//! ```
//!
//! The first cell is the floor's number. 1 is the lowest. The second cell has the modules, each in backticks, by their
//! paths from the crate root. An entry covers a module's children, unless they have their own entries. The check
//! ignores further cells.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::source::Crate;

/// The floors of a crate's modules.
pub(super) struct Floors {
    file: PathBuf,
    /// The floor, and the line of its row, by module path.
    entries: BTreeMap<String, (u32, usize)>,
}

impl Floors {
    /// Finds the table in the text of `lib.rs`.
    pub(super) fn parse(file: &Path, text: &str) -> Result<Self, String> {
        let mut floors = Self { file: file.into(), entries: BTreeMap::new() };
        let mut rows = (1..)
            .zip(text.lines())
            .map(|(line, text)| (line, text.trim().strip_prefix("//!").unwrap_or("").trim()))
            .skip_while(|(_, text)| cells(text).first().is_none_or(|cell| !cell.eq_ignore_ascii_case("floor")));
        if rows.next().is_none() {
            return Err(format!(
                "{}: no table of floors: no table in its documentation begins with `| floor |`",
                file.display()
            ));
        }
        for (line, text) in rows.skip(1).take_while(|(_, text)| text.starts_with('|')) {
            let place = format!("{}:{line}", file.display());
            let row = cells(text);
            let floor = row[0].parse().map_err(|_| format!("{place}: `{}` is not the number of a floor", row[0]))?;
            // The names between backticks.
            for module in row.get(1).unwrap_or(&"").split('`').skip(1).step_by(2) {
                let module = module.trim_start_matches("crate::").to_string();
                if floors.entries.insert(module.clone(), (floor, line)).is_some() {
                    return Err(format!("{place}: `{module}` is in the table twice"));
                }
            }
        }
        Ok(floors)
    }

    /// Returns a module's floor. Returns `None` for the root and for modules that are not in the table.
    pub(super) fn of(&self, modules: &Crate, module: usize) -> Option<u32> {
        let path = &modules[module].path;
        (1..=path.len()).rev().find_map(|length| self.entries.get(&path[..length].join("::"))).map(|entry| entry.0)
    }

    /// Returns the number of floors.
    pub(super) fn count(&self) -> usize {
        self.entries.values().map(|entry| entry.0).collect::<BTreeSet<_>>().len()
    }

    /// Returns an error for each module that is not in the table, and for each entry that is not a module.
    pub(super) fn mismatches(&self, modules: &Crate) -> Vec<String> {
        let lacking = modules.files().filter(|&module| module != Crate::ROOT && self.of(modules, module).is_none());
        let lacking = lacking.map(|module| {
            let (module, name) = (&modules[module], modules.name(module));
            format!("{}: {name} is not in the table of floors in {}", module.file.display(), self.file.display())
        });
        let paths: BTreeSet<_> = modules.files().map(|module| modules[module].path.join("::")).collect();
        let unknown = self.entries.iter().filter(|(path, _)| !paths.contains(*path));
        let unknown = unknown.map(|(path, (floor, line))| {
            format!("{}:{line}: floor {floor} has `{path}`, which is not a module of the crate", self.file.display())
        });
        lacking.chain(unknown).collect()
    }
}

/// Returns the cells of a table row. Other text has none.
fn cells(row: &str) -> Vec<&str> {
    row.strip_prefix('|').map(|row| row.split('|').map(str::trim).collect()).unwrap_or_default()
}
