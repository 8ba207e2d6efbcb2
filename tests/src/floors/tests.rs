//! Tests the check with small crates in memory, and with a real crate and a planted import.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use super::check;

const TABLE: &str = "\
//! A crate.
//!
//! | module | subject |
//! |---|---|
//! | `other` | not this table |
//!
//! | floor | modules | rule |
//! |---|---|---|
//! | 1 | `low`, [`base`](crate::base) | know `nobody` |
//! | 2 | [`middle`] | |
//! | 3 | `high`, `high::inner` | |

pub mod base;
mod high;
mod low;
mod middle;
pub use high::Thing;
pub use high::inner::Deep as Renamed;
";

/// Checks a crate with the modules in `TABLE`. `files` adds files or replaces their text.
fn checked(files: &[(&str, &str)]) -> Result<String, Vec<String>> {
    let high =
        "mod inner;\npub use inner::Deep;\npub struct Thing;\n#[macro_export]\nmacro_rules! exported { () => {} }";
    let mut all: BTreeMap<PathBuf, &str> = [
        ("lib.rs", TABLE),
        ("base.rs", ""),
        ("low.rs", ""),
        ("middle/mod.rs", ""),
        ("high/mod.rs", high),
        ("high/inner.rs", "pub struct Deep;"),
    ]
    .map(|(file, text)| (Path::new("src").join(file), text))
    .into();
    all.extend(files.iter().map(|(file, text)| (Path::new("src").join(file), *text)));
    check(Path::new("src"), &|file| all.get(file).map(|text| text.to_string()).ok_or(io::ErrorKind::NotFound.into()))
}

fn errors(files: &[(&str, &str)]) -> Vec<String> {
    checked(files).expect_err("it is found")
}

/// Asserts that `low`, with this text, has one error: it uses `module` of floor 3 on this line.
#[track_caller]
fn assert_climbs(text: &str, line: usize, module: &str) {
    let errors = errors(&[("low.rs", text)]);
    let expected = format!("src/low.rs:{line}: `low` (floor 1) uses `{module}` (floor 3): ");
    assert!(errors.len() == 1 && errors[0].starts_with(&expected), "{errors:#?}");
}

#[test]
fn a_clean_crate_passes() {
    let middle = "use crate::low::f;\nuse std::io;\nfn g() { f(); crate::base::h::<io::Error>() }";
    let summary = checked(&[("low.rs", "pub fn f() {}"), ("base.rs", "use crate::low;"), ("middle/mod.rs", middle)]);
    assert_eq!(summary.unwrap(), "5 modules on 3 floors, no import goes up, no loops");
}

#[test]
fn an_upward_import_is_named() {
    let errors = errors(&[("low.rs", "\nuse crate::high::Thing;\nfn f() -> crate::high::Thing { Thing }")]);
    assert_eq!(
        errors,
        ["src/low.rs:2: `low` (floor 1) uses `high` (floor 3): `crate::high::Thing` (also in line 3); \
          move this code up to floor 3, or pass the value from the caller"]
    );
}

#[test]
fn upward_imports_are_found_however_they_are_written() {
    assert_climbs("use crate::high;", 1, "high");
    assert_climbs("use crate::high::*;", 1, "high");
    // Through re-exports: at the root, renamed, in a `mod.rs`, in a lower module.
    assert_climbs("use crate::Thing;", 1, "high");
    assert_climbs("use crate::Renamed;", 1, "high::inner");
    assert_climbs("use crate::high::Deep;", 1, "high::inner");
    assert_climbs("pub(crate) use crate::high::Thing;\n\nfn f(_: Thing) {}", 3, "high");
    // Nested, relative, without a `use`.
    assert_climbs("use crate::{base,\n    high::{inner::{Deep as _}}};", 2, "high::inner");
    assert_climbs("mod a { mod b {\n fn f() { super::super::super::high::g() } } }", 2, "high");
    assert_climbs("use super::{high::Thing};", 1, "high");
    assert_climbs("fn f() {\n    let _ = crate::high::g();\n}", 2, "high");
    assert_climbs("fn f(x: u8) { match x { crate::high::LIMIT => {} _ => {} } }", 1, "high");
    assert_climbs("fn f<T: crate::high::Trait>() {}", 1, "high");
    assert_climbs("#[derive(crate::high::Derive)]\nstruct A;", 1, "high");
    assert_climbs("fn f() {\n    use crate::high::g;\n    g()\n}", 2, "high");
    assert_climbs("unsafe extern \"C\" {\n    safe fn f(_: crate::high::Thing);\n}", 2, "high");
    // In macro calls, in macro definitions, and by calling a macro.
    assert_climbs("fn f() {\n    println!(\"{}\", crate::high::g(1));\n}", 2, "high");
    assert_climbs("m! { use crate::{base, high::{inner::Deep}}; }", 1, "high::inner");
    assert_climbs("macro_rules! m { () => { $crate::high::g() } }", 1, "high");
    assert_climbs("fn f() { crate::exported!() }", 1, "high");
}

#[test]
fn names_brought_in_are_followed() {
    let uses_child = "use crate::low as l;\nfn f() { l::child::g() }";
    let uses = |module: &str| format!("use super::super::{module};\nfn g() {{ {module}::f() }}");
    let up = errors(&[("middle/mod.rs", uses_child), ("low.rs", "pub mod child;"), ("low/child.rs", &uses("middle"))]);
    // The import that goes up makes a loop too, which is not reported a second time.
    assert!(
        up.len() == 1 && up[0].starts_with("src/low/child.rs:1: `low::child` (floor 1) uses `middle` (floor 2): "),
        "{up:#?}"
    );
    let level = errors(&[("base.rs", uses_child), ("low.rs", "pub mod child;"), ("low/child.rs", &uses("base"))]);
    let chain = "loop: `base` → `low::child` → `base`\n    src/base.rs:2: `base` uses `low::child`: \
                 `l::child::g`\n    src/low/child.rs:2: `low::child` uses `base`: `base::f`";
    assert!(level.len() == 1 && chains(&level[0]) == chains(chain), "{level:#?}");
}

/// Returns the edges of a loop, independent of where it begins.
fn chains(error: &str) -> Vec<&str> {
    let mut lines: Vec<_> = error.lines().skip(1).collect();
    lines.sort_unstable();
    lines
}

#[test]
fn loops_are_found() {
    let two =
        errors(&[("low.rs", "use crate::base::A;\nstruct B;"), ("base.rs", "\nfn f() { crate::low::B }\nstruct A;")]);
    let arrows = "\n    src/base.rs:2: `base` uses `low`: `crate::low::B`\n    src/low.rs:1: `low` uses `base`: \
                  `crate::base::A`";
    assert_eq!(two, [format!("loop: `base` → `low` → `base`{arrows}")]);

    let child = ("middle/child.rs", "use super::A;\nuse crate::base;\npub struct C;");
    let parent = errors(&[("middle/mod.rs", "mod child;\npub use child::C;\nstruct A(C);"), child]);
    assert!(parent.len() == 1 && parent[0].starts_with("loop: `middle` → `middle::child` → `middle`"), "{parent:#?}");

    let three = errors(&[
        ("low.rs", "mod a; mod b; mod c;"),
        ("low/a.rs", "use super::b::B;"),
        ("low/b.rs", "use crate::low::c::C;"),
        ("low/c.rs", "fn f() { crate::low::a::f() }"),
    ]);
    let expected = "loop: `low::a` → `low::b` → `low::c` → `low::a`\n    src/low/a.rs:1: ";
    assert!(three.len() == 1 && three[0].starts_with(expected), "{three:#?}");

    let knot = errors(&[
        ("low.rs", "mod a; mod b; mod c;"),
        ("low/a.rs", "use super::b::B;"),
        ("low/b.rs", "use super::{a::A, c::C};"),
        ("low/c.rs", "use super::b::B;"),
    ]);
    assert_eq!(knot[0], "these 3 use each other: `low::a`, `low::b`, `low::c`");
    assert_eq!(knot.len(), 3);
}

#[test]
fn re_exports_and_imports_of_modules_are_no_loop() {
    let middle = "mod a;\nmod b;\npub(crate) use a::A;\npub(super) use b::{B, f};\nfn help() {}\n\
                  macro_rules! helper { () => {} }\npub(crate) use helper;";
    let summary = checked(&[
        ("middle/mod.rs", middle),
        ("middle/a.rs", "use super::{B, help};\npub struct A(B);"),
        ("middle/b.rs", "use crate::middle;\npub struct B;\nfn f(x: X) { x.a.f(); middle::b::g(); middle::helper!() }"),
    ]);
    assert!(summary.is_ok(), "{summary:#?}");
}

#[test]
fn the_root_is_above_all() {
    let errors = errors(&[
        ("lib.rs", &format!("{TABLE}fn run() {{ high::g() }}")),
        ("high/mod.rs", "mod inner;\nfn g() { crate::run() }"),
    ]);
    assert!(
        errors[0]
            .starts_with("src/high/mod.rs:2: `high` (floor 3) uses the crate root (above all floors): `crate::run`")
    );
    assert!(
        errors.len() == 2 && errors[1].starts_with("loop: the crate root → `high` → the crate root"),
        "{errors:#?}"
    );
}

#[test]
fn another_crates_name_belongs_to_its_re_export() {
    let high = ("high/mod.rs", "mod inner;\npub use pkru::rights;");
    let errors = errors(&[high, ("low.rs", "use pkru::high::Thing;\nuse crate::high::rights;")]);
    assert!(
        errors.len() == 1 && errors[0].starts_with("src/low.rs:2: `low` (floor 1) uses `high` (floor 3): "),
        "{errors:#?}"
    );
}

#[test]
fn tests_and_documentation_do_not_count() {
    let low = "//! [a](crate::high::Thing)
        /// [`crate::high::Thing`]
        #[doc = concat!(\"a\", crate::high::TEXT)]
        pub(in crate::low) fn f() { #[cfg(test)] { crate::high::f() } #[cfg(test)] let x = crate::high::X; }
        #[cfg(test)]
        mod absent;
        #[cfg(all(test, unix))]
        use crate::high::Thing;
        impl A { #[cfg(test)] fn f() { crate::high::f() } }
        #[test]
        fn t() { crate::high::f() }
        mod tests { use crate::high::Thing; }";
    assert!(checked(&[("low.rs", low)]).is_ok());
    assert_climbs("#[cfg(not(test))]\nuse crate::high::Thing;", 2, "high");
}

#[test]
fn the_table_and_the_modules_match() {
    let lib = TABLE.replace("`low`, ", "").replace("[`middle`]", "`middle`, `gone::child`");
    assert_eq!(
        errors(&[("lib.rs", &lib)]),
        [
            "src/low.rs: `low` is not in the table of floors in src/lib.rs",
            "src/lib.rs:10: floor 2 has `gone::child`, which is not a module of the crate",
        ]
    );
    assert_eq!(
        errors(&[("lib.rs", &TABLE.replace("[`middle`]", "`low`"))]),
        ["src/lib.rs:10: `low` is in the table twice"]
    );
    assert_eq!(
        errors(&[("lib.rs", &TABLE.replace("| 2 |", "| two |"))]),
        ["src/lib.rs:10: `two` is not the number of a floor"]
    );
    assert!(errors(&[("lib.rs", "//! A crate.")])[0].starts_with("src/lib.rs: no table of floors"));
    assert!(errors(&[("lib.rs", &format!("{TABLE}mod absent;"))])[0].starts_with("src/absent/mod.rs: cannot read it"));
    assert!(errors(&[("low.rs", "\nfn (")])[0].starts_with("src/low.rs:2: cannot parse it"));
}

/// Adds a line to a file of a real crate as it is read, and asserts that the check finds it.
fn assert_planted(folder: &str, file: &str, import: &str) {
    let folder = crate::build::workspace().join(folder);
    let planted = folder.join(file);
    let read = |path: &Path| std::fs::read_to_string(path);
    // Other errors of the crate are for `scripts/lint` to report.
    if check(&folder, &read).is_err_and(|errors| errors[0].contains("no table of floors")) {
        println!("skipped: {} has no table of floors", folder.join("lib.rs").display());
        return;
    }
    let line = read(&planted).expect("the file is there").lines().count() + 1;
    let errors = check(&folder, &|path| Ok(read(path)? + if path == planted { import } else { "" }));
    let errors = errors.expect_err("the planted import is found");
    let start = format!("{}:{line}: ", planted.display());
    assert!(
        errors.iter().any(|error| error.starts_with(&start) && error.contains("`crate::domain::Domain`")),
        "{errors:#?}"
    );
}

#[test]
fn an_import_planted_in_the_real_crate_is_found() {
    assert_planted("userspace/src", "sys/memory.rs", "use crate::domain::Domain as _Planted;\n");
}
