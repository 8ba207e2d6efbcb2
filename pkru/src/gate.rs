//! The call gate: the code that takes a call into a domain and out again.
//!
//! A round trip writes the rights register twice. On the way in the gate saves the caller's registers on the caller's stack,
//! publishes the [`Context`] of the call, and switches rights, FS base and stack; on the way out the reverse. A trap in the
//! domain ends at [`Gate::rewind`] instead, by way of the fault handler.
//!
//! # What the way out trusts
//!
//! Nothing that a mistake in the domain could have set: not a register, not the domain's stack. It knows the call by the *number of the
//! key* in whose copy of the entry thunk the domain returned, and finds the context through a table that no domain can write.
//! Each side checks after its write of the register that the value written is the one that this context calls for, because
//! code in the domain could have jumped at the instruction itself with a value of its choice; on a mismatch it stops with
//! `ud2`. A domain's own key is open to no other domain, and so the values of the register tell the running contexts apart.
//! Code that sets out to escape can still jump at the instruction with another running context's values, and its FS base set to
//! match: this contains mistakes.
//!
//! # Registers
//!
//! | step | RDI | RSI | RBX | R8 | R9 | RAX |
//! |---|---|---|---|---|---|---|
//! | enter | context | entry point | saved | | argument | |
//! | rights switched | context, reloaded from the table | | key | entry point | argument | rights |
//! | in the thunk | argument | 0 | thunk | 0 | 0 | entry point |
//! | back in the thunk | any | any | key | any | any | result |
//! | rights switched | context, reloaded from the table | result | key | | | rights |
//! | return | | | restored | | | result; RDX: 0 returned, 1 rewound |
//!
//! On the way in the general registers that carry nothing are cleared. The vector registers are not: by the calling
//! convention they carry nothing, but what they hold can be read in the domain. On the way out the callee-saved registers,
//! FS and GS base, MXCSR and the x87 control word are the caller's, the flags DF, AC and NT are clear, and the x87 stack is
//! empty, whatever the domain did.
//!
//! # References
//!
//! System V ABI, AMD64 supplement, section "Registers and the Stack Frame".

use core::arch::naked_asm;
use core::cell::UnsafeCell;
use core::fmt;
use core::mem::offset_of;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicPtr, Ordering};

use crate::domain::Entry;
use crate::instructions::IA32_PKRS;
use crate::{KeyRights, ProtectionKey};

/// Where and with what rights a domain runs, and the place where the gate keeps the caller's side of a call.
///
/// Domains must not be able to write it.
#[derive(Debug)]
#[repr(C)]
pub struct Context {
    stack: u64,
    fs_base: u64,
    rights: u32,
    /// Invariant: below 16, for it indexes [`Active`] and the thunks.
    key: u32,
    /// The bits of `rights` that tell the domain apart: those of key 0 and of its own key. Code may change the others with reason:
    /// Linux does when it makes memory executable only.
    identity: u32,
    caller: UnsafeCell<Caller>,
}

/// What the gate saves of the caller on the way in.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Caller {
    stack: u64,
    fs_base: u64,
    gs_base: u64,
    rights: u32,
    mxcsr: u32,
    x87_control: u16,
}

const CALLER: usize = offset_of!(Context, caller);
const CALLER_STACK: usize = CALLER + offset_of!(Caller, stack);
const CALLER_FS_BASE: usize = CALLER + offset_of!(Caller, fs_base);
const CALLER_GS_BASE: usize = CALLER + offset_of!(Caller, gs_base);
const CALLER_RIGHTS: usize = CALLER + offset_of!(Caller, rights);
const CALLER_MXCSR: usize = CALLER + offset_of!(Caller, mxcsr);
const CALLER_X87: usize = CALLER + offset_of!(Caller, x87_control);

impl Context {
    /// Describes a domain.
    ///
    /// `stack` is the address one past its stack, rounded down here to a multiple of 16; `fs_base` the FS base it runs with.
    /// `rights` gives all rights to `key`, which is the domain's own, and no right to write under key 0.
    ///
    /// # Panics
    ///
    /// If `rights` is not like that.
    #[must_use]
    pub const fn new(key: ProtectionKey, rights: KeyRights, stack: u64, fs_base: u64) -> Self {
        assert!(rights.get(key).is_empty(), "a domain has all rights to its own key");
        assert!(!rights.get(ProtectionKey::DEFAULT).is_empty(), "a domain has no right to write under key 0");
        Self {
            stack: stack & !15,
            fs_base,
            rights: rights.bits(),
            key: key.number() as u32,
            identity: 3 | 3 << (2 * key.number()),
            caller: UnsafeCell::new(Caller { stack: 0, fs_base: 0, gs_base: 0, rights: 0, mxcsr: 0, x87_control: 0 }),
        }
    }

    /// Returns the domain's own key.
    ///
    /// # Panics
    ///
    /// Never: a context is made of a key.
    #[must_use]
    pub const fn key(&self) -> ProtectionKey {
        ProtectionKey::new(self.key as u8).expect("a context is made of a key")
    }

    /// Returns the rights that the domain runs with.
    #[must_use]
    pub const fn rights(&self) -> KeyRights {
        KeyRights::from_bits(self.rights)
    }

    /// Returns the rights that the caller had, while a call is running.
    #[must_use]
    pub const fn caller_rights(&self) -> KeyRights {
        // SAFETY: only the gate writes the cell, on the way in; this type is not Sync, so no other thread is there.
        KeyRights::from_bits(unsafe { (*self.caller.get()).rights })
    }
}

// SAFETY: a context is plain data; a running call is tied to its thread by the borrow that `Gate::enter` holds.
unsafe impl Send for Context {}

/// How a call through the gate ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// The entry point returned this word, which the domain chose.
    Returned(u64),
    /// A trap ended the call.
    Rewound,
}

/// The state with which execution resumes when a call is rewound.
///
/// The fault handler writes all of it into the frame that it returns through. The stack pointer too: another interrupt or signal
/// may arrive before the gate has loaded it, and push its frame there with the caller's rights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rewind {
    /// The instruction pointer.
    pub instruction: u64,
    /// The stack pointer.
    pub stack: u64,
    /// RDI: the context.
    pub rdi: u64,
    /// The rights register: the caller's value.
    pub rights: KeyRights,
}

/// The contexts of running calls, by the number of the domain's own key.
struct Active([AtomicPtr<Context>; ProtectionKey::COUNT]);

impl Active {
    const fn new() -> Self {
        Self([const { AtomicPtr::new(ptr::null_mut()) }; ProtectionKey::COUNT])
    }

    fn find(&self, rights: KeyRights) -> Option<NonNull<Context>> {
        // No domain has write access to key 0. Without this, a caller's own rights would send the search into the contexts of
        // other threads, which can go away while it looks.
        if rights.get(ProtectionKey::DEFAULT).is_empty() {
            return None;
        }
        let own = ProtectionKey::all().filter(|key| rights.get(*key).is_empty());
        let mut running = own.filter_map(|key| NonNull::new(self.0[key.index()].load(Ordering::Relaxed)));
        let found = running.next()?;
        if running.next().is_some() {
            // Code in a domain has opened the key of another that is running, too; which one this is cannot be told.
            return None;
        }
        // SAFETY: rights to write under a domain's own key, and not under key 0, are in force only while that domain runs, here;
        // so its context is alive.
        let context = unsafe { found.as_ref() };
        ((context.rights ^ rights.bits()) & context.identity == 0).then_some(found)
    }
}

static ACTIVE_PKRU: Active = Active::new();
static ACTIVE_PKRS: Active = Active::new();

/// A gate: one for each register that can hold a domain's rights.
#[derive(Clone, Copy)]
pub struct Gate {
    enter: unsafe extern "C" fn(&Context, Entry, u64) -> Pair,
    rewind: unsafe extern "C" fn(),
    active: &'static Active,
}

/// Two words in RAX and RDX.
#[repr(C)]
struct Pair(u64, u64);

impl Gate {
    /// The gate that switches PKRU, for domains in user pages.
    pub const PKRU: Self = Self { enter: pkru::enter, rewind: pkru::rewind, active: &ACTIVE_PKRU };

    /// The gate that switches PKRS, for domains in supervisor pages.
    pub const PKRS: Self = Self { enter: pkrs::enter, rewind: pkrs::rewind, active: &ACTIVE_PKRS };

    /// Enters a domain, calls `entry` with `argument` there, and returns how that ended.
    ///
    /// # Safety
    ///
    /// - The register of this gate is usable, CR4.FSGSBASE is 1, and for PKRS the CPU runs in ring 0.
    /// - The context's stack is mapped, writable with the context's rights, and used by nothing else meanwhile; its FS base is
    ///   one with which `entry` can run.
    /// - No other call is running with the context's own key, and no code outside it has rights to write that key's pages
    ///   that it could use to change this call's.
    /// - A fault handler is in place that hands traps in the domain to [`Gate::rewind`].
    /// - What is read of the domain's memory afterwards is treated as hostile.
    #[inline]
    pub unsafe fn enter(&self, context: &mut Context, entry: Entry, argument: u64) -> Exit {
        // SAFETY: the caller answers for the context; the assembly keeps the C calling convention.
        match unsafe { (self.enter)(context, entry, argument) } {
            Pair(value, 0) => Exit::Returned(value),
            Pair(..) => Exit::Rewound,
        }
    }

    /// Finds the context of the call that runs with these rights, if one does.
    ///
    /// A fault handler asks this with the rights that were in force when the trap struck.
    #[must_use]
    pub fn running(&self, rights: KeyRights) -> Option<NonNull<Context>> {
        self.active.find(rights)
    }

    /// Ends the call of a running context and returns the state with which its caller resumes.
    ///
    /// # Safety
    ///
    /// [`Gate::running`] gave the context for a trap that struck on this CPU and thread, and the handler resumes there with
    /// exactly that state.
    #[must_use]
    pub unsafe fn rewind(&self, context: NonNull<Context>) -> Rewind {
        // SAFETY: the call is running, so its context is alive.
        let context = unsafe { context.as_ref() };
        self.active.0[context.key().index()].store(ptr::null_mut(), Ordering::Relaxed);
        Rewind {
            instruction: self.rewind as usize as u64,
            // SAFETY: only the gate writes the cell, on the way in, which this call has behind it.
            stack: unsafe { (*context.caller.get()).stack },
            rdi: ptr::from_ref(context) as u64,
            rights: context.caller_rights(),
        }
    }
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if ptr::eq(self.active, &ACTIVE_PKRU) { "Gate::PKRU" } else { "Gate::PKRS" })
    }
}

/// Defines the gate of one register. `select` puts the register's selector into ECX; `read` reads the register into EAX and
/// clears EDX; `write` writes it from EAX with EDX = 0.
macro_rules! gate {
    ($module:ident, $active:ident, select: $select:literal, read: $read:literal, write: $write:literal) => {
        mod $module {
            use super::*;

            /// The way in. RDI = context, RSI = entry point, RDX = argument.
            #[unsafe(naked)]
            pub(super) unsafe extern "C" fn enter(context: &Context, entry: Entry, argument: u64) -> Pair {
                naked_asm!(
                    // The caller's registers go on its stack, which the domain cannot write.
                    "push rbp",
                    "push rbx",
                    "push r12",
                    "push r13",
                    "push r14",
                    "push r15",
                    "stmxcsr [rdi + {mxcsr}]",
                    "fnstcw [rdi + {x87}]",
                    "rdfsbase rax",
                    "mov [rdi + {caller_fs_base}], rax",
                    "rdgsbase rax",
                    "mov [rdi + {caller_gs_base}], rax",
                    "mov [rdi + {caller_stack}], rsp",
                    "mov r8, rsi",
                    "mov r9, rdx",
                    $select,
                    $read,
                    "mov [rdi + {caller_rights}], eax",
                    // Publish the context under the domain's key.
                    "mov ebx, [rdi + {key}]",
                    "lea r10, [rip + {active}]",
                    "mov [r10 + rbx*8], rdi",
                    "mov eax, [rdi + {rights}]",
                    $write,
                    // From here on nothing set before is trusted: a domain may have jumped to the write.
                    "and ebx, 15",
                    "lea r10, [rip + {active}]",
                    "mov rdi, [r10 + rbx*8]",
                    "cmp eax, [rdi + {rights}]",
                    "jne {stop}",
                    "mov rcx, [rdi + {fs_base}]",
                    "wrfsbase rcx",
                    "mov rsp, [rdi + {stack}]",
                    "shl ebx, 4",
                    "lea r10, [rip + {thunks}]",
                    "add rbx, r10",
                    "mov rax, r8",
                    "mov rdi, r9",
                    "xor ecx, ecx",
                    "xor esi, esi",
                    "xor ebp, ebp",
                    "xor r8d, r8d",
                    "xor r9d, r9d",
                    "xor r10d, r10d",
                    "xor r11d, r11d",
                    "xor r12d, r12d",
                    "xor r13d, r13d",
                    "xor r14d, r14d",
                    "xor r15d, r15d",
                    "jmp rbx",
                    mxcsr = const CALLER_MXCSR,
                    x87 = const CALLER_X87,
                    caller_fs_base = const CALLER_FS_BASE,
                    caller_gs_base = const CALLER_GS_BASE,
                    caller_stack = const CALLER_STACK,
                    caller_rights = const CALLER_RIGHTS,
                    key = const offset_of!(Context, key),
                    rights = const offset_of!(Context, rights),
                    fs_base = const offset_of!(Context, fs_base),
                    stack = const offset_of!(Context, stack),
                    active = sym $active,
                    thunks = sym thunks,
                    stop = sym stop,
                )
            }

            /// Sixteen times sixteen bytes: call the entry point in RAX, and on return say in EBX whose key this was.
            #[unsafe(naked)]
            unsafe extern "C" fn thunks() {
                macro_rules! thunk {
                    ($key:literal) => {
                        concat!(".p2align 4\n call rax\n mov ebx, ", $key, "\n jmp {exit}")
                    };
                }
                naked_asm!(
                    thunk!(0),
                    thunk!(1),
                    thunk!(2),
                    thunk!(3),
                    thunk!(4),
                    thunk!(5),
                    thunk!(6),
                    thunk!(7),
                    thunk!(8),
                    thunk!(9),
                    thunk!(10),
                    thunk!(11),
                    thunk!(12),
                    thunk!(13),
                    thunk!(14),
                    thunk!(15),
                    exit = sym exit,
                )
            }

            /// The way out. EBX = key, RAX = result.
            #[unsafe(naked)]
            unsafe extern "C" fn exit() {
                naked_asm!(
                    "mov rsi, rax",
                    "lea r10, [rip + {active}]",
                    "mov rdi, [r10 + rbx*8]",
                    // A domain that returned to the thunk of another, or left with another FS base, traps here, with its own
                    // rights.
                    "rdfsbase rdx",
                    "cmp rdx, [rdi + {fs_base}]",
                    "jne {stop}",
                    $select,
                    $read,
                    "xor eax, [rdi + {rights}]",
                    "test eax, [rdi + {identity}]",
                    "jne {stop}",
                    // The stack first: a signal between the two shall not push its frame where the domain says.
                    "mov rsp, [rdi + {caller_stack}]",
                    "mov eax, [rdi + {caller_rights}]",
                    $write,
                    // From here on nothing set before is trusted: a domain may have jumped to the write.
                    "and ebx, 15",
                    "lea r10, [rip + {active}]",
                    "mov rdi, [r10 + rbx*8]",
                    "cmp eax, [rdi + {caller_rights}]",
                    "jne {stop}",
                    "rdfsbase rdx",
                    "cmp rdx, [rdi + {fs_base}]",
                    "jne {stop}",
                    "mov qword ptr [r10 + rbx*8], 0",
                    "xor edx, edx",
                    "jmp {leave}",
                    active = sym $active,
                    fs_base = const offset_of!(Context, fs_base),
                    rights = const offset_of!(Context, rights),
                    identity = const offset_of!(Context, identity),
                    caller_stack = const CALLER_STACK,
                    caller_rights = const CALLER_RIGHTS,
                    stop = sym stop,
                    leave = sym leave,
                )
            }

            /// Where a fault handler resumes. RDI = context; the rights are the caller's.
            #[unsafe(naked)]
            pub(super) unsafe extern "C" fn rewind() {
                naked_asm!("xor esi, esi", "mov edx, 1", "jmp {leave}", leave = sym leave)
            }
        }
    };
}

gate!(pkru, ACTIVE_PKRU, select: "xor ecx, ecx", read: "rdpkru", write: "wrpkru");
gate!(pkrs, ACTIVE_PKRS, select: "mov ecx, 0x6e1", read: "rdmsr", write: "xor edx, edx\n wrmsr");

const _: () = assert!(IA32_PKRS == 0x6e1, "the gate names the MSR by number");

/// The end of both ways out, with the caller's rights. RDI = context, RSI = result, RDX = 0 returned or 1 rewound.
#[unsafe(naked)]
unsafe extern "C" fn leave() {
    naked_asm!(
        "mov rcx, [rdi + {fs_base}]",
        "wrfsbase rcx",
        "mov rcx, [rdi + {gs_base}]",
        "wrgsbase rcx",
        "mov rsp, [rdi + {stack}]",
        "cld",
        // AC would make the caller's misaligned accesses trap, NT its IRET. POPF is slow, so only where one is set.
        "pushfq",
        "test dword ptr [rsp], {flags}",
        "jz 2f",
        "and dword ptr [rsp], ~{flags}",
        "popfq",
        "push rax",
        "2: pop rax",
        "fninit",
        "fldcw [rdi + {x87}]",
        "ldmxcsr [rdi + {mxcsr}]",
        "mov rax, rsi",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbx",
        "pop rbp",
        "ret",
        fs_base = const CALLER_FS_BASE,
        gs_base = const CALLER_GS_BASE,
        stack = const CALLER_STACK,
        mxcsr = const CALLER_MXCSR,
        x87 = const CALLER_X87,
        flags = const 1 << 14 | 1 << 18,
    )
}

/// Stops a way in or out whose check failed.
#[unsafe(naked)]
unsafe extern "C" fn stop() {
    naked_asm!("ud2")
}
