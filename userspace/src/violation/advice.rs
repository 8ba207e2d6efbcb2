//! What to do about a write to the program's memory, where the code that writes may be right.
//!
//! The advice follows from what is known: what the address belongs to, whose code writes, and what its instruction does.
//! It must not lead an attack to success. So it never proposes to open all statics unless code writes a static of its own
//! object.

use std::borrow::Cow;

use super::operation::Operation;
use super::symbol::Symbol;

/// What is known of a write to the program's memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Write<'a> {
    /// The function that writes.
    pub(super) symbol: Option<&'a Symbol>,
    /// What it writes.
    pub(super) target: Option<&'a Symbol>,
    pub(super) operation: Operation,
}

/// Returns advice, to be appended to a message; empty if there is none.
pub(super) fn advice(write: &Write<'_>) -> Cow<'static, str> {
    let Write { symbol, target, operation } = *write;
    if symbol.and_then(Symbol::name) == Some("pthread_create") {
        return "; code in a domain cannot start threads".into();
    }
    match (target, operation) {
        (Some(target), _) if target.is_variable => of_static(symbol, target, operation),
        // Code or constants. Nobody may write these.
        (Some(_), _) => "".into(),
        (None, Operation::Counts) => {
            "; this code changes a count of the caller's, as cloning or dropping an `Arc` or `Rc` \
            does: let it borrow what the pointer leads to, and clone and drop the pointer outside"
                .into()
        }
        (None, Operation::Exchanges) => {
            "; this code changes an atomic of the caller's, as taking a lock does: take the lock \
            outside, and let the code use what the guard leads to"
                .into()
        }
        (None, Operation::Other) => {
            "; if this code has to write there, have it allocate and return what it writes, or use a \
            `Region` or a callback"
                .into()
        }
    }
}

fn of_static(symbol: Option<&Symbol>, target: &Symbol, operation: Operation) -> Cow<'static, str> {
    let is_own = symbol.is_some_and(|symbol| symbol.library == target.library);
    // The functions of the runtime write for others, which are not known.
    let is_for_others = symbol.is_some_and(|symbol| symbol.is_of_runtime) && !target.is_of_runtime;
    if !is_own && !is_for_others {
        let writer = symbol.map_or("code that is in no file", |symbol| &symbol.file);
        let owner = &target.file;
        return format!("; a static of {owner} is not for {writer} to write: its pointer may be wrong").into();
    }
    let mut ways = Vec::new();
    // A count is written with each use.
    if !target.is_of_runtime && operation != Operation::Counts {
        ways.push(
            "initialise it before, outside the domain (Builder::warm_up), unless it is written at each use".to_owned(),
        );
    }
    if target.can_be_owned {
        ways.push(format!("give the domain {}'s data (Builder::library)", target.file));
    }
    if is_own {
        ways.push("make all statics writable in the domain (Globals::Writable)".to_owned());
    }
    if target.is_of_runtime {
        ways.insert(0, "do this outside the domain or in a callback".to_owned());
    }
    if is_for_others {
        ways.push("have the code return what it writes".to_owned());
    }
    if ways.is_empty() {
        return "".into();
    }
    format!("; if this code has to write that static, {}", ways.join(", or ")).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn symbol(file: &str, name: &str) -> Symbol {
        let is_library = file.starts_with("lib") && file != "libc.so.6";
        Symbol {
            is_unread: false,
            name: Some(name.into()),
            offset: 0,
            library: file.into(),
            file: file.into(),
            is_variable: name.chars().any(char::is_uppercase),
            can_be_owned: is_library,
            is_of_runtime: file == "libc.so.6" || name.starts_with("std::"),
        }
    }

    #[track_caller]
    fn check(writer: Option<(&str, &str)>, target: Option<(&str, &str)>, operation: Operation, expected: &[&str]) {
        let [writer, target] = [writer, target].map(|place| place.map(|(file, name)| symbol(file, name)));
        let text = advice(&Write { symbol: writer.as_ref(), target: target.as_ref(), operation });
        assert!(text.is_empty() == expected.is_empty(), "{text}");
        for part in ["warm_up", "Builder::library", "Globals::Writable", "Arc", "lock", "Region", "wrong", "threads"] {
            assert_eq!(text.contains(part), expected.contains(&part), "`{part}` in: {text}");
        }
    }

    #[test]
    fn it_follows_from_what_is_known() {
        use Operation::{Counts, Exchanges, Other};
        let program = Some(("program", "app::run"));
        let library = Some(("libpng.so", "png_read"));
        let libc = Some(("libc.so.6", "memcpy"));
        // The caller's heap and stacks.
        check(program, None, Other, &["Region"]);
        check(program, None, Counts, &["Arc"]);
        check(program, None, Exchanges, &["lock"]);
        check(None, None, Other, &["Region"]);
        // Statics of the code's own object.
        check(program, Some(("program", "app::CACHE")), Other, &["warm_up", "Globals::Writable"]);
        check(program, Some(("program", "app::CALLS")), Counts, &["Globals::Writable"]);
        check(program, Some(("program", "app::ONCE")), Exchanges, &["warm_up", "Globals::Writable"]);
        check(library, Some(("libpng.so", "TABLE")), Other, &["warm_up", "Builder::library", "Globals::Writable"]);
        check(Some(("libc.so.6", "srand")), Some(("libc.so.6", "STATE")), Other, &["Globals::Writable"]);
        check(Some(("program", "std::io::print")), Some(("program", "std::STDOUT")), Exchanges, &["Globals::Writable"]);
        // Those that a function of the runtime writes, for whoever has called it.
        check(libc, Some(("libpng.so", "TABLE")), Other, &["warm_up", "Builder::library"]);
        check(libc, Some(("program", "app::CACHE")), Other, &["warm_up"]);
        // Those of others.
        check(library, Some(("program", "app::CACHE")), Other, &["wrong"]);
        check(library, Some(("libc.so.6", "STATE")), Other, &["wrong"]);
        check(library, Some(("libz.so", "TABLE")), Other, &["wrong"]);
        check(None, Some(("libz.so", "TABLE")), Other, &["wrong"]);
        // Code and constants.
        check(library, Some(("program", "app::run")), Other, &[]);
        check(Some(("libc.so.6", "pthread_create")), Some(("libc.so.6", "STATE")), Other, &["threads"]);
    }
}
