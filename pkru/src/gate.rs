//! The call gate: the code that takes a call into a domain and out again.
//!
//! A round trip writes the rights register twice. On the way in the gate saves the caller's registers on the caller's
//! stack, publishes the [`Context`] of the call, and switches rights, FS base and stack; on the way out the reverse. A
//! trap in the domain ends at [`Gate::rewind`] instead, by way of the fault handler.
//!
//! # What the way out trusts
//!
//! Nothing that a mistake in the domain could have set: not a register, not the domain's stack. The code in the domain
//! comes back with the number of its key in RBX, a register that it was to preserve. That is a claim: it leads to a
//! context through a table that no domain can write, and is believed only if the rights in force are that context's. A
//! domain's own key is open to no other domain, and so the rights tell the running contexts apart. Where they do not
//! fit, it traps with the domain's rights, and is rewound.
//!
//! Each side also checks after its write of the register that the value written is the one that this context calls for,
//! because code in the domain could have jumped at the instruction itself with a value of its choice; on a mismatch it
//! stops with `ud2`. On the way out the FS base, which is the caller's by then, is compared too: it tells threads
//! apart. Code that sets out to escape can still jump there with another running context's values, and its FS base set
//! to match: this contains mistakes.
//!
//! # Order
//!
//! On the way out the stack pointer and the FS base are the caller's before the rights are: an interrupt or signal that
//! arrives between finds no moment in which the caller's rights are in force with the domain's stack or thread-locals.
//!
//! # Registers
//!
//! | step | R10 | R8 | RDI | RBX | RSI | RAX |
//! |---|---|---|---|---|---|---|
//! | enter | context | entry point | argument | saved | | |
//! | rights switched | context, reloaded from the table | entry point | argument | key | | rights |
//! | in the domain | context | entry point | argument | key | 0 | rights |
//! | back from the entry point | any | any | any | the key, it claims | any | result |
//! | rights switched | context, reloaded from the table | | | key | result | rights |
//! | return | | | | restored | result; RDX: 0 returned, 1 rewound | |
//!
//! On the way in the general registers that carry nothing are cleared. The vector registers are not: by the calling
//! convention they carry nothing, but what they hold can be read in the domain. On the way out RBX and RBP, FS and GS
//! base, MXCSR and the x87 control word are the caller's, the flags DF, AC and NT are clear, and the x87 stack is
//! empty, whatever the domain did. R12 to R15 are saved by the code that calls the gate, which is inlined, so that they
//! are saved once.
//!
//! # References
//!
//! System V ABI, AMD64 supplement, section "Registers and the Stack Frame".

use core::arch::{asm, naked_asm};
use core::cell::UnsafeCell;
use core::mem::{offset_of, size_of};
use core::ops::Range;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicPtr, Ordering};

use crate::domain::Entry;
use crate::instructions::IA32_PKRS;
use crate::{AccessRights, KeyRights, ProtectionKey};

/// Where and with what rights a domain runs, and the place where the gate keeps the caller's side of a call.
///
/// Domains must not be able to write it.
#[derive(Debug)]
#[repr(C)]
pub struct Context {
    stack: u64,
    fs_base: u64,
    rights: u32,
    /// Invariant: below 16, for it indexes [`Active`].
    key: u32,
    /// The bits of `rights` that tell the domain apart: those of key 0 and of its own key. Code may change the others
    /// with reason: Linux does when it makes memory executable only.
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
    /// `stack` is the address one past its stack, rounded down here to a multiple of 16; `fs_base` the FS base it runs
    /// with. `rights` gives all rights to `key`, which is the domain's own, and no right to write under key 0.
    ///
    /// # Panics
    ///
    /// If `rights` is not like that.
    #[must_use]
    pub const fn new(key: ProtectionKey, rights: KeyRights, stack: u64, fs_base: u64) -> Self {
        let mut context = Self::without_key(stack, fs_base);
        context.set_key(key, rights);
        context
    }

    /// Describes a domain that has no key yet. To enter it would be a trap at once.
    #[must_use]
    pub const fn without_key(stack: u64, fs_base: u64) -> Self {
        let caller = Caller { stack: 0, fs_base: 0, gs_base: 0, rights: 0, mxcsr: 0, x87_control: 0 };
        let (rights, caller) = (KeyRights::NONE.bits(), UnsafeCell::new(caller));
        Self { stack: stack & !15, fs_base, rights, key: 0, identity: u32::MAX, caller }
    }

    /// Gives the domain another key of its own, and other rights.
    ///
    /// # Panics
    ///
    /// As for [`new`](Self::new).
    pub const fn set_key(&mut self, key: ProtectionKey, rights: KeyRights) {
        assert!(rights.get(key).is_empty(), "a domain has all rights to its own key");
        assert!(!rights.get(ProtectionKey::DEFAULT).is_empty(), "a domain has no right to write under key 0");
        self.rights = rights.bits();
        self.key = key.number() as u32;
        self.identity = 3 | 3 << (2 * key.number());
    }

    /// Replaces stack and FS base, as in [`new`](Self::new).
    pub const fn set_place(&mut self, stack: u64, fs_base: u64) {
        self.stack = stack & !15;
        self.fs_base = fs_base;
    }

    /// Returns the address one past the domain's stack.
    #[must_use]
    pub const fn stack(&self) -> u64 {
        self.stack
    }

    /// Returns the domain's own key.
    ///
    /// # Panics
    ///
    /// Never: a context is made of a key.
    #[must_use]
    #[inline]
    pub const fn key(&self) -> ProtectionKey {
        ProtectionKey::new(self.key as u8).expect("a context is made of a key")
    }

    /// Returns the rights that the domain runs with.
    #[must_use]
    pub const fn rights(&self) -> KeyRights {
        KeyRights::from_bits(self.rights)
    }

    /// Returns the rights that the caller had when it last entered.
    #[must_use]
    #[inline]
    pub const fn caller_rights(&self) -> KeyRights {
        // SAFETY: only the gate writes the cell, on the way in; this type is not Sync, so no other thread is there.
        KeyRights::from_bits(unsafe { (*self.caller.get()).rights })
    }

    /// Returns whether the caller, when it last entered, had all rights to the domain's own key and to key 0.
    #[must_use]
    #[inline]
    pub const fn caller_has_rights(&self) -> bool {
        self.caller_rights().bits() & self.identity == 0
    }

    /// Gives the caller more rights than it had when it last entered, in force when it gets control back.
    pub fn grant_to_caller(&self, key: ProtectionKey) {
        let rights = self.caller_rights().with(key, AccessRights::READ_WRITE);
        // SAFETY: this type is not Sync, so no other thread is there, and the gate reads the cell only when the call
        // ends.
        unsafe { (*self.caller.get()).rights = rights.bits() };
    }

    /// Returns the FS base that the caller had when it last entered.
    #[must_use]
    pub const fn caller_fs_base(&self) -> u64 {
        // SAFETY: as in `caller_rights`.
        unsafe { (*self.caller.get()).fs_base }
    }

    /// Returns the stack pointer of the caller when it last entered; below it, its stack is free.
    #[must_use]
    pub const fn caller_stack(&self) -> u64 {
        // SAFETY: as in `caller_rights`.
        unsafe { (*self.caller.get()).stack }
    }
}

// SAFETY: a context is plain data; while a call runs, `Gate::enter` has it for itself.
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
/// The fault handler writes all of it but the FS base into the frame that it returns through, and the FS base, which
/// frames do not hold, into the register: another interrupt or signal may arrive before the gate has run an
/// instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rewind {
    /// The instruction pointer.
    pub instruction: u64,
    /// The stack pointer.
    pub stack: u64,
    /// R10: the context.
    pub r10: u64,
    /// The FS base.
    pub fs_base: u64,
    /// The rights register: the caller's value.
    pub rights: KeyRights,
}

impl Rewind {
    /// The bits of RFLAGS that a domain may have set and that must be clear when the caller resumes: TF, DF, NT and AC.
    pub const CLEARED_FLAGS: u64 = 1 << 8 | 1 << 10 | 1 << 14 | 1 << 18;
}

/// The contexts of running calls, by the number of the domain's own key. On pages of its own.
#[repr(align(4096))]
struct Active([AtomicPtr<Context>; ProtectionKey::COUNT]);

impl Active {
    const fn new() -> Self {
        Self([const { AtomicPtr::new(ptr::null_mut()) }; ProtectionKey::COUNT])
    }

    fn find(&self, rights: KeyRights) -> Option<NonNull<Context>> {
        // No domain has write access to key 0. Without this, a caller's own rights would send the search into the
        // contexts of other threads, which can go away while it looks.
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
        // SAFETY: rights to write under a domain's own key, and not under key 0, are in force only while that domain
        // runs, here; so its context is alive.
        let context = unsafe { found.as_ref() };
        ((context.rights ^ rights.bits()) & context.identity == 0).then_some(found)
    }
}

static ACTIVE_PKRU: Active = Active::new();
static ACTIVE_PKRS: Active = Active::new();

/// A gate: one for each register that can hold a domain's rights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// The gate that switches PKRU, for domains in user pages.
    Pkru,
    /// The gate that switches PKRS, for domains in supervisor pages.
    Pkrs,
}

impl Gate {
    /// Enters a domain, calls `entry` with `argument` there, and returns how that ended.
    ///
    /// The context may be the first field of something larger: [`running`](Self::running) gives a fault handler this very
    /// pointer.
    ///
    /// # Safety
    ///
    /// - The context is alive, and nothing but a fault handler on this CPU and thread uses it meanwhile.
    /// - The register of this gate is usable, CR4.FSGSBASE is 1, and for PKRS the CPU runs in ring 0.
    /// - The context's stack is mapped, writable with the context's rights, and used by nothing else meanwhile; its FS
    ///   base is one with which `entry` can run.
    /// - No other call is running with the context's own key, and no code outside it has rights to write that key's
    ///   pages that it could use to change this call's.
    /// - A fault handler is in place that hands traps in the domain to [`Gate::rewind`].
    /// - What is read of the domain's memory afterwards is treated as hostile.
    #[inline]
    pub unsafe fn enter(self, context: *mut Context, entry: Entry, argument: u64) -> Exit {
        let (value, rewound): (u64, u64);
        macro_rules! call {
            ($enter:path) => {
                // SAFETY: the caller answers for the context. The assembly keeps RBX and RBP, and says what else it
                // changes.
                unsafe {
                    asm!(
                        "call {enter}",
                        enter = sym $enter,
                        inout("r10") context => _,
                        inout("r8") entry => _,
                        inout("rdi") argument => _,
                        lateout("rsi") value,
                        lateout("rdx") rewound,
                        lateout("r12") _,
                        lateout("r13") _,
                        lateout("r14") _,
                        lateout("r15") _,
                        clobber_abi("C"),
                    )
                }
            };
        }
        match self {
            Self::Pkru => call!(pkru::enter),
            Self::Pkrs => call!(pkrs::enter),
        }
        if rewound == 0 { Exit::Returned(value) } else { Exit::Rewound }
    }

    /// Finds the context of the call that runs with these rights, if one does.
    ///
    /// A fault handler asks this with the rights that were in force when the trap struck.
    #[must_use]
    pub fn running(self, rights: KeyRights) -> Option<NonNull<Context>> {
        self.active().find(rights)
    }

    /// Returns the context of the call that runs with this key as its domain's own, if one does, on any CPU or thread.
    ///
    /// It may be over, and the context gone, unless this is asked where the call runs.
    #[must_use]
    pub fn running_with(self, key: ProtectionKey) -> Option<NonNull<Context>> {
        NonNull::new(self.active().0[key.index()].load(Ordering::Relaxed))
    }

    /// Ends the call of a running context and returns the state with which its caller resumes.
    ///
    /// # Safety
    ///
    /// [`Gate::running`] or [`Gate::running_with`] gave the context for a trap that struck on this CPU and thread, and
    /// the handler resumes there with exactly that state.
    #[must_use]
    pub unsafe fn rewind(self, context: NonNull<Context>) -> Rewind {
        // SAFETY: the call is running, so its context is alive.
        let context = unsafe { context.as_ref() };
        self.active().0[context.key().index()].store(ptr::null_mut(), Ordering::Relaxed);
        Rewind {
            instruction: rewind as *const () as usize as u64,
            stack: context.caller_stack(),
            r10: ptr::from_ref(context) as u64,
            fs_base: context.caller_fs_base(),
            rights: context.caller_rights(),
        }
    }

    /// Takes a running call out of sight, while its CPU or thread runs other code in the middle of it, such as a signal
    /// handler of the program's: what happens there is not the domain's doing. [`show`](Self::show) brings it back.
    ///
    /// # Safety
    ///
    /// As for [`rewind`](Self::rewind), for the trap or interrupt that makes that code run. Without `show` the call
    /// must not go on.
    pub unsafe fn hide(self, context: NonNull<Context>) {
        // SAFETY: the call is running, so its context is alive.
        let key = unsafe { context.as_ref() }.key();
        self.active().0[key.index()].store(ptr::null_mut(), Ordering::Relaxed);
    }

    /// Undoes [`hide`](Self::hide).
    ///
    /// # Safety
    ///
    /// The context was hidden, and its call is about to go on.
    pub unsafe fn show(self, context: NonNull<Context>) {
        // SAFETY: the call is not over, so its context is alive.
        let key = unsafe { context.as_ref() }.key();
        self.active().0[key.index()].store(context.as_ptr(), Ordering::Relaxed);
    }

    /// Returns the addresses of the gate's own state: whole pages with nothing else on them, which no domain may write.
    #[must_use]
    pub fn state(self) -> Range<usize> {
        let start = ptr::from_ref(self.active()).addr();
        start..start + size_of::<Active>()
    }

    const fn active(self) -> &'static Active {
        match self {
            Self::Pkru => &ACTIVE_PKRU,
            Self::Pkrs => &ACTIVE_PKRS,
        }
    }
}

/// In a domain: leaves as if the entry point had returned `word`, with the stack as it is.
///
/// The caller can [enter](Gate::enter) the domain again with an entry point that takes the stack up where this left it:
/// one that touches no stack before it has set the stack pointer, for what it is called on is the top of the same
/// stack. So code in a domain asks its caller for something in the middle of its work. `key` is the domain's own and
/// `stack` the end of its stack, as in its context.
///
/// # Safety
///
/// It is called in a domain that was entered on this stack.
#[unsafe(naked)]
pub unsafe extern "C" fn suspend(key: u64, word: u64, stack: u64) -> ! {
    // The gate's return address is the first thing on the domain's stack.
    naked_asm!("mov rbx, rdi", "mov rax, rsi", "lea rsp, [rdx - 8]", "ret")
}

/// Flags that must not reach the caller: AC makes its misaligned accesses trap, NT its IRET.
const FLAGS: u32 = 1 << 14 | 1 << 18;

/// The end of both ways out, with the caller's rights and FS base. R10 = context, RSI and RDX as they are returned.
macro_rules! leave {
    () => {
        "mov rcx, [r10 + {gs_base}]
        wrgsbase rcx
        mov rsp, [r10 + {caller_stack}]
        cld
        /* POPF is slow, so only where one of the flags is set. */
        pushfq
        test dword ptr [rsp], {flags}
        jz 2f
        and dword ptr [rsp], ~{flags}
        popfq
        push rax
        2: pop rax
        fninit
        fldcw [r10 + {x87}]
        ldmxcsr [r10 + {mxcsr}]
        pop rbx
        pop rbp
        ret"
    };
}

/// Defines the gate of one register. `select` puts the register's selector into ECX; `read` reads the register into EAX
/// and clears EDX; `write` writes it from EAX with EDX = 0.
macro_rules! gate {
    ($module:ident, $active:ident, select: $select:literal, read: $read:literal, write: $write:literal) => {
        mod $module {
            use super::*;

            /// The way in and out. R10 = context, R8 = entry point, RDI = argument; returns RSI = result, RDX = 0.
            #[unsafe(naked)]
            pub(super) unsafe extern "C" fn enter() {
                naked_asm!(
                    // The caller's registers go on its stack, which the domain cannot write.
                    "push rbp",
                    "push rbx",
                    "stmxcsr [r10 + {mxcsr}]",
                    "fnstcw [r10 + {x87}]",
                    "rdfsbase rax",
                    "mov [r10 + {caller_fs_base}], rax",
                    "rdgsbase rax",
                    "mov [r10 + {gs_base}], rax",
                    "mov [r10 + {caller_stack}], rsp",
                    $select,
                    $read,
                    "mov [r10 + {caller_rights}], eax",
                    // Publish the context under the domain's key.
                    "mov ebx, [r10 + {key}]",
                    "lea r11, [rip + {active}]",
                    "mov [r11 + rbx*8], r10",
                    "mov eax, [r10 + {rights}]",
                    $write,
                    // From here on nothing set before is trusted: a domain may have jumped to the write.
                    "and ebx, 15",
                    "lea r11, [rip + {active}]",
                    "mov r10, [r11 + rbx*8]",
                    "cmp eax, [r10 + {rights}]",
                    "jne {stop}",
                    "mov rcx, [r10 + {fs_base}]",
                    "wrfsbase rcx",
                    "mov rsp, [r10 + {stack}]",
                    "xor esi, esi",
                    "xor ebp, ebp",
                    "xor r9d, r9d",
                    "xor r12d, r12d",
                    "xor r13d, r13d",
                    "xor r14d, r14d",
                    "xor r15d, r15d",
                    "call r8",
                    "mov rsi, rax",
                    // Whatever the claim is, it leads into the table.
                    "and ebx, 15",
                    "lea r11, [rip + {active}]",
                    "mov r10, [r11 + rbx*8]",
                    // A domain that claims the key of another traps here at the latest, with its own rights.
                    $select,
                    $read,
                    "xor eax, [r10 + {rights}]",
                    "test eax, [r10 + {identity}]",
                    "jne {stop}",
                    "mov rsp, [r10 + {caller_stack}]",
                    "mov r9, [r10 + {caller_fs_base}]",
                    "wrfsbase r9",
                    "mov eax, [r10 + {caller_rights}]",
                    $write,
                    // From here on nothing set before is trusted: a domain may have jumped to the write.
                    "and ebx, 15",
                    "lea r11, [rip + {active}]",
                    "mov r10, [r11 + rbx*8]",
                    "cmp eax, [r10 + {caller_rights}]",
                    "jne {stop}",
                    "rdfsbase rax",
                    "cmp rax, [r10 + {caller_fs_base}]",
                    "jne {stop}",
                    "mov qword ptr [r11 + rbx*8], 0",
                    // The write of the register has left EDX = 0.
                    leave!(),
                    mxcsr = const CALLER_MXCSR,
                    x87 = const CALLER_X87,
                    caller_fs_base = const CALLER_FS_BASE,
                    gs_base = const CALLER_GS_BASE,
                    caller_stack = const CALLER_STACK,
                    caller_rights = const CALLER_RIGHTS,
                    key = const offset_of!(Context, key),
                    rights = const offset_of!(Context, rights),
                    identity = const offset_of!(Context, identity),
                    fs_base = const offset_of!(Context, fs_base),
                    stack = const offset_of!(Context, stack),
                    flags = const FLAGS,
                    active = sym $active,
                    stop = sym stop,
                )
            }
        }
    };
}

gate!(pkru, ACTIVE_PKRU, select: "xor ecx, ecx", read: "rdpkru", write: "wrpkru");
gate!(pkrs, ACTIVE_PKRS, select: "mov ecx, 0x6e1", read: "rdmsr", write: "xor edx, edx\n wrmsr");

const _: () = assert!(IA32_PKRS == 0x6e1, "the gate names the MSR by number");

/// Where a fault handler resumes. R10 = context; rights, stack pointer and FS base are the caller's.
#[unsafe(naked)]
unsafe extern "C" fn rewind() {
    naked_asm!(
        "xor esi, esi",
        "mov edx, 1",
        leave!(),
        gs_base = const CALLER_GS_BASE,
        caller_stack = const CALLER_STACK,
        flags = const FLAGS,
        mxcsr = const CALLER_MXCSR,
        x87 = const CALLER_X87,
    )
}

/// Stops a way in or out whose check failed.
#[unsafe(naked)]
unsafe extern "C" fn stop() {
    naked_asm!("ud2")
}
