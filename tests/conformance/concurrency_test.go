package conformance

import (
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const clients = 16

// atOnce runs f for all clients, each with a connection of its own.
func atOnce(t testing.TB, s *server, f func(i int, s *server)) {
	t.Helper()
	var wg sync.WaitGroup
	start := make(chan struct{})
	for i := range clients {
		own := *s
		conn, err := dial(s.socket)
		must(t, err)
		defer conn.Close()
		own.conn = conn
		wg.Go(func() {
			<-start
			f(i, &own)
		})
	}
	close(start)
	wg.Wait()
}

// tally counts the codes of calls that were made at once.
type tally struct {
	mu    sync.Mutex
	codes map[codes.Code]int
}

func (c *tally) add(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.codes == nil {
		c.codes = map[codes.Code]int{}
	}
	c.codes[status.Code(err)]++
}

// wantOne is one success, and one code for all others.
func (c *tally) wantOne(t testing.TB, what string, others codes.Code) {
	t.Helper()
	if c.codes[codes.OK] != 1 || c.codes[others] != clients-1 {
		t.Errorf("%s: %v, want one OK and the rest %v", what, c.codes, others)
	}
}

// TestConcurrency is about calls that meet.
func TestConcurrency(t *testing.T) {
	needRoot(t)
	t.Parallel()

	t.Run("Disjoint", func(t *testing.T) {
		t.Parallel()
		s := serve(t)
		const rounds = 12
		atOnce(t, s, func(i int, s *server) {
			parent := ""
			for r := range rounds {
				key, to := fmt.Sprintf("%d/%d/active", i, r), fmt.Sprintf("%d/%d", i, r)
				m, err := s.prepare(key, parent, map[string]string{"client": fmt.Sprint(i)})
				if err != nil {
					t.Errorf("client %d: %v", i, err)
					return
				}
				if err := os.WriteFile(fmt.Sprintf("%s/%d-%d", upper(t, m), i, r), []byte(to), 0o644); err != nil {
					t.Error(err)
				}
				if err := s.commit(to, key, "", nil); err != nil {
					t.Errorf("client %d: %v", i, err)
					return
				}
				parent = to
			}
		})
		if got := len(s.names(t)); got != clients*rounds {
			t.Errorf("%d snapshots, want %d", got, clients*rounds)
		}
		for i := range clients {
			m, err := s.view(fmt.Sprintf("look %d", i), fmt.Sprintf("%d/%d", i, rounds-1), nil)
			must(t, err)
			mounted(t, m, func(dir string) {
				files, err := os.ReadDir(dir)
				must(t, err)
				if len(files) != rounds {
					t.Errorf("client %d sees %d files, want its own %d", i, len(files), rounds)
				}
				wantFile(t, fmt.Sprintf("%s/%d-0", dir, i), fmt.Sprintf("%d/0", i))
			})
		}
		s.wantConsistent(t)
	})

	t.Run("SameKeys", func(t *testing.T) {
		t.Parallel()
		s := serve(t)
		s.layer(t, "base", "", nil)
		for r := range 15 {
			at := func(what string) string { return fmt.Sprintf("%s %d", what, r) }
			var prepare, commitName, commitKey, view, remove tally
			atOnce(t, s, func(_ int, s *server) {
				_, err := s.prepare(at("key"), "base", nil)
				prepare.add(err)
			})
			prepare.wantOne(t, "Prepare of one key", codes.AlreadyExists)
			atOnce(t, s, func(i int, s *server) {
				commitKey.add(s.commit(fmt.Sprintf("name %d %d", r, i), at("key"), "", nil))
			})
			commitKey.wantOne(t, "Commit of one key", codes.NotFound)
			atOnce(t, s, func(i int, s *server) {
				key := fmt.Sprintf("own %d %d", r, i)
				if _, err := s.prepare(key, "base", nil); err != nil {
					t.Error(err)
				}
				err := s.commit(at("target"), key, "", nil)
				commitName.add(err)
				if err != nil { // then the active is as it was
					if err := s.remove(key); err != nil {
						t.Errorf("after a refused Commit: %v", err)
					}
				}
			})
			commitName.wantOne(t, "Commit to one name", codes.AlreadyExists)
			atOnce(t, s, func(_ int, s *server) {
				_, err := s.view(at("view"), at("target"), nil)
				view.add(err)
			})
			view.wantOne(t, "View of one key", codes.AlreadyExists)
			must(t, s.remove(at("view")))
			atOnce(t, s, func(_ int, s *server) { remove.add(s.remove(at("target"))) })
			remove.wantOne(t, "Remove of one key", codes.NotFound)
		}
		if got := len(s.names(t)); got != 1+15 {
			t.Errorf("%d snapshots are left, want 16", got)
		}
		must(t, s.cleanup())
		s.wantConsistent(t)
	})

	t.Run("ParentsGo", func(t *testing.T) {
		t.Parallel()
		parentsGo(t)
	})
}

// parentsGo removes parents while children are made on them. A child whose
// parent is not listed can never be collected by containerd.
func parentsGo(t *testing.T) {
	s := serve(t)
	const parents, rounds = 6, 60
	done := make(chan struct{})
	var watch sync.WaitGroup
	watch.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
				noOrphans(t, s)
			}
		}
	})
	atOnce(t, s, func(i int, s *server) {
		rng := rand.New(rand.NewPCG(7, uint64(i)))
		allow := func(what string, err error, good ...codes.Code) bool {
			for _, c := range append(good, codes.OK) {
				if status.Code(err) == c {
					return err == nil
				}
			}
			t.Errorf("%s: %v", what, err)
			return false
		}
		for r := range rounds {
			parent := fmt.Sprintf("parent %d", rng.IntN(parents))
			key := fmt.Sprintf("key %d %d", i, r)
			switch rng.IntN(5) {
			case 0:
				_, err := s.prepare(key, "", nil)
				if allow("Prepare", err) && !allow("Commit", s.commit(parent, key, "", nil), codes.AlreadyExists) {
					allow("Remove", s.remove(key))
				}
			case 1:
				allow("Remove of a parent", s.remove(parent), codes.NotFound, codes.FailedPrecondition)
			case 2:
				_, err := s.prepare(key, parent, nil)
				if allow("Prepare on a parent", err, codes.NotFound) {
					_, err = s.stat(parent)
					allow("Stat of a parent in use", err)
					allow("Remove", s.remove(key))
				}
			case 3:
				_, err := s.view(key, parent, nil)
				if allow("View of a parent", err, codes.NotFound) {
					allow("Remove", s.remove(key))
				}
			case 4: // rebase onto a parent that may be gone by then
				_, err := s.prepare(key, "", nil)
				if !allow("Prepare", err) {
					continue
				}
				if allow("Commit onto a parent", s.commit(key+" done", key, parent, nil), codes.NotFound) {
					allow("Remove", s.remove(key+" done"))
				} else {
					allow("Remove", s.remove(key))
				}
			}
			if r%20 == i {
				allow("Cleanup", s.cleanup())
			}
		}
	})
	close(done)
	watch.Wait()
	noOrphans(t, s)
	for _, n := range s.names(t) {
		must(t, s.remove(n)) // only parents are left, and nothing holds them
	}
	must(t, s.cleanup())
	s.wantConsistent(t)
}

// noOrphans looks whether each listed snapshot's parent is in the same list.
func noOrphans(t testing.TB, s *server) {
	t.Helper()
	infos, err := s.list()
	if err != nil {
		t.Error(err)
		return
	}
	kinds := map[string]snapshotsapi.Kind{}
	for _, i := range infos {
		kinds[i.GetName()] = i.GetKind()
	}
	for _, i := range infos {
		if i.GetParent() == "" {
			continue
		}
		if kind, ok := kinds[i.GetParent()]; !ok || kind != snapshotsapi.Kind_COMMITTED {
			t.Errorf("%q is listed, its parent %q is not (or is %v)", i.GetName(), i.GetParent(), kind)
		}
	}
}
