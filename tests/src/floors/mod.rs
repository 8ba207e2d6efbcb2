//! Checks the layers of a crate's modules, called floors, from its source.
//!
//! The documentation of the crate's `lib.rs` has the table of floors: see [`table`]. A module may use modules of its
//! own floor and of lower floors. Modules must not use each other in a loop. The crate root is above all floors.
//!
//! A module is a file here. It uses the files that define the names it mentions, even if it gets a name through a
//! re-export. A name of another crate counts as defined by the file that re-exports it. A re-export itself is not a
//! use. Tests and documentation do not count.
//!
//! | module | subject |
//! |---|---|
//! | [`table`] | the table of floors |
//! | [`source`] | the modules, and the paths that each mentions |
//! | [`names`] | which module defines what a path names |
//! | [`loops`] | loops in a graph |
//!
//! # Limits
//!
//! The check does not see method calls, names that a macro generates, or symbols that the linker resolves. It mistakes
//! a local variable for a re-export of the same name.

mod loops;
mod names;
mod source;
mod table;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::process::ExitCode;

use names::Dependency;
use source::Crate;
use table::Floors;

/// Reads a file. Tests replace it to read from memory.
type Read<'a> = &'a dyn Fn(&Path) -> io::Result<String>;

/// Checks the crates whose `lib.rs` is in these folders, and prints the errors.
pub(crate) fn run(folders: &[&str]) -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    for folder in folders {
        match check(Path::new(folder), &|file| std::fs::read_to_string(file)) {
            Ok(summary) => println!("floors: {summary} ({folder})"),
            Err(errors) => {
                code = ExitCode::FAILURE;
                errors.iter().for_each(|error| eprintln!("{error}"));
                eprintln!("floors: errors: {} ({folder})", errors.len());
            }
        }
    }
    code
}

/// Checks one crate. Returns a summary, or all errors.
fn check(folder: &Path, read: Read<'_>) -> Result<String, Vec<String>> {
    let root = folder.join("lib.rs");
    let floors = read(&root)
        .map_err(|error| format!("{}: cannot read it: {error}", root.display()))
        .and_then(|text| Floors::parse(&root, &text))
        .map_err(|error| vec![error])?;
    let modules = Crate::read(&root, read).map_err(|error| vec![error])?;

    let dependencies = names::dependencies(&modules);
    let mut errors = floors.mismatches(&modules);
    errors.extend(climbs(&modules, &floors, &dependencies));
    errors.extend(knots(&modules, &floors, &dependencies));
    if !errors.is_empty() {
        return Err(errors);
    }
    let count = modules.files().count() - 1;
    Ok(format!("{count} modules on {} floors, no import goes up, no loops", floors.count()))
}

/// Returns an error for each pair of modules in which one uses the other on a higher floor.
fn climbs(modules: &Crate, floors: &Floors, dependencies: &[Dependency]) -> Vec<String> {
    let mut pairs: BTreeMap<_, Vec<&Dependency>> = BTreeMap::new();
    for dependency in dependencies {
        pairs.entry((dependency.from, dependency.to)).or_default().push(dependency);
    }
    let mut errors = Vec::new();
    for ((from, to), uses) in pairs {
        // The root has no floor and may use all modules. A module missing from the table is an error already.
        let Some(low) = floors.of(modules, from) else { continue };
        let (place, advice) = match floors.of(modules, to) {
            Some(high) if high > low => (format!("floor {high}"), format!("move this code up to floor {high}")),
            None if to == Crate::ROOT => ("above all floors".into(), "move what it uses to a module below".into()),
            _ => continue,
        };
        let lines: BTreeSet<_> =
            uses.iter().map(|dependency| dependency.line).filter(|&line| line != uses[0].line).collect();
        let lines: Vec<_> = lines.iter().map(usize::to_string).collect();
        let also = if lines.is_empty() { String::new() } else { format!(" (also in line {})", lines.join(", ")) };
        errors.push(format!(
            "{} (floor {low}) uses {} ({place}): `{}`{also}; {advice}, or pass the value from the caller",
            arrow_start(modules, uses[0]),
            modules.name(to),
            uses[0].path,
        ));
    }
    errors
}

/// Returns an error for each shortest loop through a module, and one for each group of modules with several loops.
fn knots(modules: &Crate, floors: &Floors, dependencies: &[Dependency]) -> Vec<String> {
    let mut arrows: BTreeMap<_, &Dependency> = BTreeMap::new();
    // An import of a module alone is not a use. What the code uses through it is mentioned separately. An import that goes
    // up is an error already, and would tie half the crate together.
    let goes_up = |dependency: &&Dependency| {
        let (low, high) = (floors.of(modules, dependency.from), floors.of(modules, dependency.to));
        low.is_some() && high > low
    };
    for dependency in dependencies.iter().filter(|dependency| !dependency.is_module && !goes_up(dependency)) {
        arrows.entry((dependency.from, dependency.to)).or_insert(dependency);
    }
    let mut errors = Vec::new();
    for knot in loops::find(&arrows.keys().copied().collect()) {
        let names = |list: &[usize], between: &str| {
            list.iter().map(|&module| modules.name(module)).collect::<Vec<_>>().join(between)
        };
        if knot.loops.len() > 1 {
            errors.push(format!("these {} use each other: {}", knot.modules.len(), names(&knot.modules, ", ")));
        }
        for chain in &knot.loops {
            let mut error = format!("loop: {} → {}", names(chain, " → "), modules.name(chain[0]));
            for (from, to) in loops::pairs(chain) {
                let arrow = arrows[&(from, to)];
                error += &format!("\n    {} uses {}: `{}`", arrow_start(modules, arrow), modules.name(to), arrow.path);
            }
            errors.push(error);
        }
    }
    errors
}

fn arrow_start(modules: &Crate, arrow: &Dependency) -> String {
    format!("{}:{}: {}", modules[arrow.from].file.display(), arrow.line, modules.name(arrow.from))
}
