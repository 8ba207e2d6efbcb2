//! The outcome of a call whose code misbehaved.
//!
//! What this folder reads in the domain's memory is hostile: it copies, bounds and escapes it.
//!
//! | module | subject |
//! |---|---|
//! | [`kind`] | the kinds of violation |
//! | `classify` | which kind a trap is |
//! | `advice`, `operation` | what to do about a write that may be right |
//! | [`symbol`], [`symbol_tables`] | the names of addresses |

mod advice;
mod classify;
mod kind;
mod operation;
mod symbol;
pub(crate) mod symbol_tables;

use std::borrow::Cow;
use std::fmt::{self, Write as _};
use std::sync::Arc;

use pkru::ProtectionKey;
use pkru::fault::KeyFault;
use pkru::rights::Access;

use crate::backend::pku::Memory;
use crate::inside::entry::is_entry;
use crate::keys::statics;
use advice::Write;
use kind::Escaped;
use operation::Operation;

pub(crate) use classify::{classify, is_told_by_its_state};
pub use kind::ViolationKind;
pub use symbol::Symbol;

/// The outcome of a call whose code misbehaved.
///
/// Everything outside the domain is as it was, except [regions](crate::Region), what callbacks have done and what
/// [`Globals::Writable`](crate::Globals::Writable) made writable. The next call finds the domain empty and works. System
/// calls that code in the domain had made are not undone.
///
/// `Display` writes one line that says what happened, where, and what to do about it; `Debug` writes the same, so that
/// `unwrap` shows it. All of it is settled when the violation occurs. For that the first violation at a function or
/// variable reads the symbol table of its file, which takes some milliseconds.
#[derive(Clone)]
pub struct Violation(
    // Shared, so that a clone and a result that may be a violation are cheap.
    Arc<Details>,
);

#[derive(Debug)]
struct Details {
    domain: Arc<str>,
    kind: ViolationKind,
    /// The instruction that was stopped, and the function that it belongs to.
    instruction: Option<u64>,
    symbol: Option<Arc<Symbol>>,
    /// What the accessed address belongs to.
    target: Option<Symbol>,
    /// Whose memory a key protects, if a key denied the access.
    owner: Option<Owner>,
    /// The name of the closure that was called, if it is a trap.
    closure: Option<&'static str>,
    /// The domain may write the program's statics.
    has_statics: bool,
    /// What to do about it.
    advice: Cow<'static, str>,
    /// What it displays.
    text: String,
}

/// The owner of memory that a domain may not access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    Program,
    /// The domain itself: a guard page after this part of its memory.
    GuardAfter(&'static str),
    /// Another domain, a vault or a region.
    Other,
}

impl Violation {
    pub(crate) fn new(domain: Arc<str>, kind: ViolationKind) -> Self {
        Details {
            domain,
            kind,
            instruction: None,
            symbol: None,
            target: None,
            owner: None,
            closure: None,
            has_statics: false,
            advice: Cow::Borrowed(""),
            text: String::new(),
        }
        .settle()
    }

    /// Returns whether it is of this kind, at this instruction, and in a call of this closure.
    ///
    /// The compiler can make one function of several closures, so the instruction alone does not tell them apart.
    pub(crate) fn is(&self, kind: &ViolationKind, instruction: Option<u64>, closure: &'static str) -> bool {
        self.is_at(instruction, closure) && self.0.kind == *kind
    }

    /// Returns whether a call of this closure ended in it.
    pub(crate) fn is_of(&self, closure: &'static str) -> bool {
        // By address: where the same name has two, nothing is reused.
        self.0.closure.is_some_and(|other| std::ptr::eq(other, closure))
    }

    fn is_at(&self, instruction: Option<u64>, closure: &'static str) -> bool {
        self.0.instruction == instruction && self.is_of(closure)
    }

    /// Makes a violation of a trap in a domain with this memory, as [`classify()`] has classified it. `closure` is the name of the closure that was
    /// called. `last` is an earlier violation, whose symbol is used again if the instruction is the same.
    #[cold]
    #[inline(never)]
    pub(crate) fn of_trap(
        domain: Arc<str>,
        memory: &Memory,
        kind: ViolationKind,
        instruction: Option<u64>,
        closure: &'static str,
        last: Option<&Self>,
    ) -> Self {
        let known = last.filter(|last| last.is_at(instruction, closure)).and_then(|last| last.0.symbol.clone());
        let symbol = known.or_else(|| {
            let symbol = symbol_tables::find(instruction?)?;
            Some(Arc::new(match &symbol.name {
                // The compiler has made one function of the two.
                Some(name) if is_entry(name) => Symbol { name: Some(closure.into()), ..symbol },
                _ => symbol,
            }))
        });
        let target = kind.address().or(kind.site()).and_then(symbol_tables::find);
        let owner = if let ViolationKind::Key(fault) = &kind {
            Some(match memory.ends_before(fault.address) {
                Some(part) => Owner::GuardAfter(part),
                None if statics::is_programs(fault.key) => Owner::Program,
                None => Owner::Other,
            })
        } else {
            None
        };
        let advice = match (&kind, owner, instruction) {
            (ViolationKind::Key(KeyFault { access: Access::Write, .. }), Some(Owner::Program), Some(instruction)) => {
                let operation = Operation::at(instruction);
                advice::advice(&Write { symbol: symbol.as_deref(), target: target.as_ref(), operation })
            }
            _ => Cow::Borrowed(""),
        };
        let (closure, text) = (Some(closure), String::new());
        let has_statics = memory.thread_pointer_with_statics().is_some();
        Details { domain, kind, instruction, symbol, target, owner, closure, has_statics, advice, text }.settle()
    }

    /// Returns whether the files were read in which the names stand that it displays.
    pub(crate) fn is_complete(&self) -> bool {
        let symbols = [self.0.symbol.as_deref(), self.0.target.as_ref()];
        !symbols.into_iter().flatten().any(|symbol| symbol.is_unread)
    }

    /// Returns the name of the domain.
    #[must_use]
    pub fn domain(&self) -> &str {
        &self.0.domain
    }

    /// Returns how the code misbehaved.
    #[must_use]
    pub fn kind(&self) -> &ViolationKind {
        &self.0.kind
    }

    /// Returns the address that was accessed, if the violation is an access.
    #[must_use]
    pub fn address(&self) -> Option<u64> {
        self.0.kind.address()
    }

    /// Returns the kind of access, if a key or a mapping denied it.
    #[must_use]
    pub fn access(&self) -> Option<Access> {
        match self.0.kind {
            ViolationKind::Key(KeyFault { access, .. })
            | ViolationKind::Null { access, .. }
            | ViolationKind::Unmapped { access, .. } => Some(access),
            _ => None,
        }
    }

    /// Returns the key of the page, if a key denied the access.
    #[must_use]
    pub fn key(&self) -> Option<ProtectionKey> {
        match self.0.kind {
            ViolationKind::Key(KeyFault { key, .. }) => Some(key),
            _ => None,
        }
    }

    /// Returns whether the domain may write the program's statics ([`Globals::Writable`](crate::Globals::Writable)).
    ///
    /// What it was changing there when the call ended may then be half done, and locks that it held stay locked, except
    /// those of the C library's standard streams.
    #[must_use]
    pub fn may_have_left_statics_changed(&self) -> bool {
        self.0.has_statics
    }

    /// Returns the address of the instruction, if one was stopped.
    #[must_use]
    pub fn instruction(&self) -> Option<u64> {
        self.0.instruction
    }

    /// Returns the function that the instruction belongs to, if it is known.
    #[must_use]
    pub fn symbol(&self) -> Option<&Symbol> {
        self.0.symbol.as_deref()
    }

    /// Returns the variable or function that the accessed address belongs to, if it is known. For heap corruption it is the
    /// function that allocated or freed the block.
    #[must_use]
    pub fn target(&self) -> Option<&Symbol> {
        self.0.target.as_ref()
    }
}

impl Details {
    /// Writes the text.
    fn settle(mut self) -> Violation {
        /// As long as most texts, in bytes.
        const USUAL: usize = 512;
        let mut text = String::with_capacity(USUAL);
        // Writing to a string does not fail.
        let _ = self.write(&mut text);
        self.text = text;
        Violation(Arc::new(self))
    }

    fn write(&self, f: &mut String) -> fmt::Result {
        let Self { domain, kind, instruction, symbol, target, owner, has_statics, advice, .. } = self;
        write!(f, "domain `{}`: {kind}", Escaped(domain))?;
        match (target, owner) {
            (Some(target), _) => write!(f, " ({target})")?,
            (None, Some(Owner::Program)) => f.write_str(" (the program's memory)")?,
            (None, Some(Owner::GuardAfter(part))) => write!(f, " (past the end of the domain's own {part})")?,
            (None, Some(Owner::Other)) => f.write_str(" (memory of another domain, a vault or a region)")?,
            (None, None) => {}
        }
        if let Some(instruction) = instruction {
            write!(f, ", at instruction {instruction:#x}")?;
        }
        if let Some(symbol) = symbol {
            write!(f, " in {symbol}")?;
        }
        f.write_str(advice)?;
        if *has_statics {
            f.write_str("; the program's statics were open to it: what it was changing there may be half done")?;
        }
        Ok(())
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.text)
    }
}

impl fmt::Debug for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Violation {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.0.kind {
            ViolationKind::InvalidFree(error) => Some(error),
            ViolationKind::InvalidResult(error) => Some(error),
            ViolationKind::NotReady(error) => Some(error),
            _ => None,
        }
    }
}
